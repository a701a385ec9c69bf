"""Lowering to ONNX, export, parity with torch, onnxruntime sessions, timing.

session = thesean.deploy.Session("model.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thesean.deploy.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:
    if name == "Session":  # reads much that writing a file doesn't, and so is read when it is asked for
        from thesean.deploy.session import Session

        return Session
    raise AttributeError(f"module 'thesean.deploy' has no attribute {name!r}")
