"""The text of the functions that tokens held at a fixed number of places are in an ONNX model."""
