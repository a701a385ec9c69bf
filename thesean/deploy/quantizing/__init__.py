"""Files whose weights are whole numbers, made by onnxruntime's own tools and held against the exact file."""
