"""What a model of transformers' kind is called with: what is given in another form, and what there is not.

B batch, T time, S what was read before and T
"""

from __future__ import annotations

from typing import Any

import torch

from thesean.errors import DataError
from thesean.passes.graph.signature import InputSpec

_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def cast(value: Any, spec: InputSpec) -> Any:
    """Masks of any kind, and whole numbers of any size, as transformers' models take them."""
    if not isinstance(value, torch.Tensor):
        return value
    any_kind = spec.name == "attention_mask" or spec.dtype.is_floating_point
    whole = value.dtype in _WHOLE and spec.dtype in _WHOLE
    return value.to(spec.dtype) if any_kind or whole else value


def checked_ids(ids_BT: Any) -> torch.Tensor:
    """As int64. Raises DataError."""
    if not isinstance(ids_BT, torch.Tensor):
        found = "none" if ids_BT is None else type(ids_BT).__name__
        raise DataError(f"input_ids: expected a tensor of shape (batch, time), found {found}.")
    if ids_BT.ndim != 2 or ids_BT.dtype not in _WHOLE:
        found = f"{ids_BT.dtype} of shape {tuple(ids_BT.shape)}"
        raise DataError(f"input_ids: expected whole numbers of shape (batch, time), found {found}.")
    if not ids_BT.shape[1]:
        raise DataError(f"input_ids is empty, of shape {tuple(ids_BT.shape)}: expected a token or more.")
    return ids_BT.to(torch.int64)


def check_mask(mask_BS: Any, ids_BT: torch.Tensor, before: int) -> None:
    """Of what is read now, or of all that was and is. Raises DataError."""
    if mask_BS is None:
        return
    rows, time = ids_BT.shape
    if not isinstance(mask_BS, torch.Tensor) or tuple(mask_BS.shape) not in ((rows, time), (rows, before + time)):
        found = f"shape {tuple(mask_BS.shape)}" if isinstance(mask_BS, torch.Tensor) else type(mask_BS).__name__
        read = f", or {(rows, before + time)} with what was read before" if before else ""
        raise DataError(f"attention_mask: expected a tensor of shape {(rows, time)}{read}, found {found}.")


def outputs_asked(given: dict[str, Any]) -> tuple[str, ...]:
    """Names of the arguments that ask for more outputs. Raises DataError where one does."""
    names = ("output_attentions", "output_hidden_states")
    if asked := next((name for name in names if given.get(name)), None):
        raise DataError(f"{asked}: a graph has the outputs that the guide was captured with, and no others.")
    return names
