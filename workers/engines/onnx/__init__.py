"""ONNX Runtime: models are exported once and run as graphs."""
