"""Analysis of data and models: reports, figures, attention, features, sharpness, and GPU budgets."""
