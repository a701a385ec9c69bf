"""From graph modules to ONNX operators."""
