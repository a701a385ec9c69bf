"""Triton's kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/kernels/interpreted`, in its own process.

The variable counts when triton is first imported, and what the interpreter patches would break compilation: other runs
collect nothing here.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
