"""The student: DeiT-LT, a ViT with two classification tokens, CLS and DIST."""
