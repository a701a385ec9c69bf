"""Hybrids and where their files go.

B batch, T time
"""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
