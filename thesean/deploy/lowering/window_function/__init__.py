"""The text of the function that a window is in an ONNX model."""
