"""The flat teacher: a CNN image classifier."""
