"""Folders that onnxruntime-genai serves."""
