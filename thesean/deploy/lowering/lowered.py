"""The module that stands in for a core while exporting, and the forms by the names of their operations."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from thesean.errors import ExportError
from thesean.kernels.shared.precision import HALF, wide
from thesean.targets.shared.core import Core
from thesean.targets.shared.held import Held
from thesean.targets.shared.window import Window

_FORMS = "thesean.deploy.lowering.forms"


class Lowered(nn.Module):
    """`emit` as a module: a kernel's arguments and results, ONNX operators inside. Like the kernel it computes half
    precision in float32, and what is carried on stays so where it came so. Raises ExportError where it is run outside
    an export.
    """

    def __init__(self, path: str, emit: Callable[..., Any]) -> None:
        super().__init__()
        self.path = path
        self.emit = emit

    def forward(self, *tensors: Any) -> Any:
        require_exporting(self.path)
        given = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if not any(t.dtype in HALF for t in given):
            return self.emit(*tensors)
        made = self.emit(*(wide(t) if isinstance(t, torch.Tensor) else t for t in tensors))
        dtype = given[0].dtype
        if isinstance(made, torch.Tensor):
            return made.to(dtype)
        carried = dtype if all(t.dtype == dtype for t in given) else torch.float32
        return made[0].to(dtype), *(state.to(carried) for state in made[1:])


def require_exporting(path: str) -> None:
    """Outside an export the symbolic operators return zeros without a word: refuse instead."""
    if not torch.compiler.is_exporting():
        raise ExportError(
            f"{path or 'module'}: a lowered cell ran outside an export. Run the module it was lowered from."
        )


def operation_of(module: nn.Module) -> str | None:
    """The name of the form that takes a module's place: the operation of a core and of what is made of several,
    "torch_cell" for nn.RNN and its kin.
    """
    if isinstance(module, nn.RNNBase):
        return "torch_cell"
    return module.operation if isinstance(module, Core | Held | Window) else None


def operations(module: nn.Module) -> list[str]:
    """Those of a module and all that is inside it, sorted."""
    return sorted({name for m in module.modules() if (name := operation_of(m)) is not None})


def form_of(operation: str) -> ModuleType | None:
    """The file that defines `lower(module, path, opset)`, and `define(model)` where it needs an ONNX function."""
    if importlib.util.find_spec(f"{_FORMS}.{operation}") is None:
        return None
    return importlib.import_module(f"{_FORMS}.{operation}")


def add_function(model: Any, text: str) -> None:
    """Give an onnx_ir model a function, written in ONNX's own syntax."""
    import onnx
    import onnx_ir as ir

    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function


def file_of(operation: str) -> str:
    """Where a form is looked for, as a contributor would write it."""
    return f"thesean/deploy/lowering/forms/{operation}.py"
