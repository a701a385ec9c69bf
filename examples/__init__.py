"""The demos: `python -m examples.demo_gpt2`, `python -m examples.demo_digits`; `python examples/quickstart.py`."""
