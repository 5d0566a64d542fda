"""The student: DeiT-LT, a ViT with two output tokens."""
