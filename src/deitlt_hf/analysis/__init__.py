"""Looking at data and models."""
