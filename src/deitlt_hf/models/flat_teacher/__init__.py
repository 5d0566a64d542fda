"""The teacher: a CNN for classification."""
