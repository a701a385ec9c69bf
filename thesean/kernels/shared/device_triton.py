"""Where Triton's kernels run: on the GPU that holds the tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 was set before triton was imported: kernels then run in numpy, slowly."""
    return bool(triton.knobs.runtime.interpret)


def device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's. Raises ValueError off the GPU."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    if interpreting():
        return nullcontext()
    raise ValueError(
        f"expected CUDA tensors for Triton, found {x.device.type}. Use backend='torch' or backend='auto', or set "
        "TRITON_INTERPRET=1 before the first import of triton to debug the kernels on a CPU."
    )
