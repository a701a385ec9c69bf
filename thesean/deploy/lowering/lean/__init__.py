"""Passes on the ONNX graph that leave fewer nodes: at one token a node costs more than what it computes."""
