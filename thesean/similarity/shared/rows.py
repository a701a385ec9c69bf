"""From activations of any shape to rows of examples, without the padding.

N examples, P width
"""

from __future__ import annotations

from typing import Literal

import torch

from thesean.errors import DataError, unknown_name

Flatten = Literal["example", "token"]


def rows(name: str, x: torch.Tensor, flatten: Flatten = "example", mask: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, ...) or, by token, (..., P) -> x_NP. `mask`: True, or 1, where a row counts, of shape (N,) or (...).

    What is masked takes no part in the result, even where it is NaN, and gets a gradient of 0. Raises DataError for a
    shape that does not fit, UnknownNameError for another way to flatten.
    """
    if x.ndim < 2:
        raise DataError(f"expected {name} of (examples, ..., width), found shape {tuple(x.shape)}.")
    if flatten == "example":
        x_NP, leading = x.flatten(1), x.shape[:1]
    elif flatten == "token":
        x_NP, leading = x.flatten(0, -2), x.shape[:-1]
    else:
        raise unknown_name("flatten", flatten, ("example", "token"))
    if mask is None:
        return x_NP
    if mask.is_floating_point() or mask.is_complex():
        raise DataError(f"mask: expected True or 1 where {name} counts, found {mask.dtype}. Make it so: mask.bool().")
    if mask.shape not in (leading, x_NP.shape[:1]):
        hint = " Use flatten='token' to mask tokens." if flatten == "example" and mask.ndim > 1 else ""
        raise DataError(f"mask: expected shape {tuple(leading)} for {name}, found {tuple(mask.shape)}.{hint}")
    return x_NP[mask.reshape(-1).to(x_NP.device, torch.bool)]
