"""The models: one package each, whose two files travel with saved weights."""
