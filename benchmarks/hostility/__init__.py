"""What `python -m benchmarks hostile` asks for: tables of inputs, a file a kind, and what tries one of them out."""
