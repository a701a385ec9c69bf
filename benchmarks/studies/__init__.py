"""Benchmarks that take hours: what defaults were chosen by. They run when named, and all in their quick forms."""
