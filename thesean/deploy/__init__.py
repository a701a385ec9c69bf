"""Lowering to ONNX, export, parity with torch, onnxruntime sessions, timing."""
