"""Recurrent cells -> ONNX operators: what torch's exporter can't write with a dynamic length or a given state.

B batch, T time
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from torch import nn

from thesean.deploy.lowering.lowered import form_of, operation_of
from thesean.passes.graph.surgery import frozen

Module = TypeVar("Module", bound=nn.Module)


def lower_inside(module: Module, *, opset: int, path: str) -> Module:
    """`module` itself as torch code, with copies of what is in it whose cells are lowered."""
    inside = copy.copy(module)
    inside._modules = {
        n: None if m is None else lower_cells(m, opset=opset, path=path) for n, m in module._modules.items()
    }
    return inside


def lower_cells(module: nn.Module, *, opset: int = 18, path: str = "") -> nn.Module:
    """A frozen copy of `module` whose recurrent cells emit ONNX operators under `torch.onnx.export(dynamo=True)`.

    Its weights are those of `module`, in memory once. nn.RNN, nn.GRU, nn.LSTM and each `Core` become what
    `forms/<operation>.py` says: `lower(module, path, opset)`. All keep dynamic batch and length; example sizes must be
    2 or more. `opset` is the one that the export will ask for. Run outside an export, the copy raises ExportError.

    A core without a form stays as it is, torch code: a kernel without a loop over time is often written as well by
    torch's exporter, and the comparison in onnxruntime decides. Where it isn't, `to_onnx` names the file to add.
    Raises ExportError for a cell that its form can't write (an LSTM with projections), naming its path.
    """
    return _replaced(module, path, lambda form, child, where: form.lower(child, where, opset))


def lower_portably(module: nn.Module, *, opset: int) -> nn.Module:
    """The same in standard operators alone: `portable(module, path, opset)` of a form that has one, else `lower`. Where
    it gives None the module stays torch code, and what is inside it is lowered.
    """

    def replace(form: ModuleType, child: nn.Module, where: str) -> nn.Module | None:
        return (form.portable if hasattr(form, "portable") else form.lower)(child, where, opset)

    return _replaced(module, "", replace)


def cells_in_torch(module: nn.Module) -> nn.Module:
    """A frozen copy of `module` whose recurrent cells `torch.export` writes once for every length.

    Each becomes what `forms/<operation>.py` says: `in_torch(module, path)`, torch code again; what has none stays as it
    is, its insides excepted.
    """

    def replace(form: ModuleType, child: nn.Module, where: str) -> nn.Module | None:
        return form.in_torch(child, where) if hasattr(form, "in_torch") else None

    return _replaced(module, "", replace)


def _replaced(
    module: nn.Module, path: str, replace: Callable[[ModuleType, nn.Module, str], nn.Module | None]
) -> nn.Module:
    """`replace`: from a form and a module that it is of to what takes the module's place, if anything does."""
    # One cell used in two places stays one cell. The original is kept beside its stand-in, or its id would be reused.
    replaced: dict[int, tuple[nn.Module, nn.Module]] = {}

    def visit(child: nn.Module, where: str) -> nn.Module:
        if id(child) not in replaced:
            operation = operation_of(child)
            form = None if operation is None else form_of(operation)
            other = None if form is None else replace(form, child, where)
            replaced[id(child)] = (child, child if other is None else other)
            if other is None:
                for name, grandchild in list(child._modules.items()):  # named_children() skips repeated ones
                    if grandchild is not None:
                        setattr(child, name, visit(grandchild, f"{where}.{name}" if where else name))
        return replaced[id(child)][1]

    # without gradients: torch 2.13's scan warns about .grad of inner tensors when it traces a trainable graph
    return visit(frozen(module), path)
