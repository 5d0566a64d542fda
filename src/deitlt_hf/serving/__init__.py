"""Trained models in use: endpoint handler, prediction from files, ONNX, demo page."""
