"""Latency in onnxruntime: of files, of parts, of plans, and what the figures say."""
