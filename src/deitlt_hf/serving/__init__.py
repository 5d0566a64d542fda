"""Inference with trained models: endpoint handler, prediction for image files, ONNX export, demo page."""
