"""The parameter-free hearts of the recurrent targets: modules of their own, so that lowering can swap them by name."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn


class Core(nn.Module):
    """The function `thesean.kernels.<operation>` as a module: its tensors in, its tensors out, nothing to save.

    `settings` are the kernel's keywords. `deploy/lowering/forms/<operation>.py` is what an export writes in its place.
    Raises ModuleNotFoundError where there is no such kernel.
    """

    def __init__(self, operation: str, **settings: Any) -> None:
        super().__init__()
        self.operation = operation
        self.settings = settings
        self.kernel = getattr(importlib.import_module(f"thesean.kernels.{operation}"), operation)

    def forward(self, *tensors: Any) -> Any:
        return self.kernel(*tensors, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join([self.operation, *(f"{k}={v}" for k, v in self.settings.items())])
