"""How each Triton kernel is launched: block sizes, warps and stages, fixed per operation, architecture and dtype.

Nothing is tuned when a module is imported or first used: a static table gives the same kernel, and so the same bits, in
every process. Each entry is compiled ahead of time for its architecture by `make kernels-check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Arch = Literal["sm80", "sm90", "sm100", "gfx942"]
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The published limits of one architecture."""

    backend: Literal["cuda", "hip"]
    arch: int | str  # as Triton names it
    warp_size: int
    shared_bytes: int  # per thread block; CUDA C++ Programming Guide, AMD CDNA 3 ISA
    processors: int  # streaming multiprocessors or compute units of A100, H100, B200, MI300X


HARDWARE: dict[Arch, Hardware] = {
    "sm80": Hardware(backend="cuda", arch=80, warp_size=32, shared_bytes=163 * 1024, processors=108),
    "sm90": Hardware(backend="cuda", arch=90, warp_size=32, shared_bytes=227 * 1024, processors=132),
    "sm100": Hardware(backend="cuda", arch=100, warp_size=32, shared_bytes=227 * 1024, processors=148),
    "gfx942": Hardware(backend="hip", arch="gfx942", warp_size=64, shared_bytes=64 * 1024, processors=304),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One table entry. `block` x `depth` is the tile that is loaded at a time."""

    block: int
    depth: int
    warps: int
    stages: int = 1
    precision: str | None = None  # of tl.dot: None where the kernel has no matrix product

    @property
    def options(self) -> dict[str, Any]:
        # fused multiply-add, which Triton 3.10 will no longer do unasked
        return dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)


# fp32 is split in three tf32 products: one alone leaves three digits. AMD's matrix cores take fp32 as it is. sm80 keeps
# its operands in registers, and spills where a step is deeper; sm90 and sm100 read them from shared memory.
_GRAM_FLOAT: dict[Arch, Launch] = {
    "sm80": Launch(block=64, depth=16, warps=8, stages=3, precision="tf32x3"),
    "sm90": Launch(block=64, depth=32, warps=8, stages=3, precision="tf32x3"),
    "sm100": Launch(block=64, depth=32, warps=8, stages=3, precision="tf32x3"),
    "gfx942": Launch(block=64, depth=32, warps=4, stages=2, precision="ieee"),
}
_GRAM_HALF: dict[Arch, Launch] = {
    "sm80": Launch(block=64, depth=64, warps=8, stages=3, precision="ieee"),
    "sm90": Launch(block=64, depth=64, warps=4, stages=3, precision="ieee"),
    "sm100": Launch(block=64, depth=64, warps=4, stages=3, precision="ieee"),
    "gfx942": Launch(block=64, depth=64, warps=4, stages=2, precision="ieee"),
}


def _tables() -> dict[tuple[str, Arch, torch.dtype], Launch]:
    table: dict[tuple[str, Arch, torch.dtype], Launch] = {}
    for arch, hardware in HARDWARE.items():
        # One warp a program: a recurrence is bound by latency, and programs hide it. A row is one 128-byte line and
        # more where warps are wider; half precision holds twice the channels in it.
        line = hardware.warp_size
        for dtype in (*DTYPES, torch.float64):
            width = 2 * line if dtype in HALF else line
            table["linear_recurrence", arch, dtype] = Launch(block=width, depth=8, warps=1)
        for dtype in DTYPES:
            table["cka", arch, dtype] = (_GRAM_HALF if dtype in HALF else _GRAM_FLOAT)[arch]
        # reads stored fp32 Grams, whatever the features were; larger tiles spill on sm80
        table["gram_statistics", arch, torch.float32] = Launch(block=32, depth=32, warps=4)
        table["dmnn", arch, torch.float32] = Launch(block=8, depth=128, warps=4)
    return table


TABLE = _tables()


def architecture(device: torch.device) -> Arch:
    """The table's architecture for a device. One that it lacks gets sm80's entries, which ask for the least."""
    if device.type != "cuda":
        return "sm80"  # the interpreter
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x, the consumer Blackwells, have neither the matrix instructions of 10.x nor its shared memory
    known: dict[int, Arch] = {9: "sm90", 10: "sm100"}
    return known.get(major, "sm80")


def launch(op: str, device: torch.device, dtype: torch.dtype) -> Launch:
    """The entry of `op`. Raises ValueError for a dtype that it has no kernel for."""
    try:
        return TABLE[op, architecture(device), dtype]
    except KeyError:
        known = ", ".join(sorted({str(d).removeprefix("torch.") for name, _, d in TABLE if name == op}))
        raise ValueError(
            f"{op}: expected {known} for the Triton kernel, found {str(dtype).removeprefix('torch.')}. "
            "Use backend='torch' or backend='auto'."
        ) from None


def slices(device: torch.device, tiles: int, width: int, entry: Launch) -> int:
    """Into how many ranges of features a Gram is split, so that few tiles still fill the device (split-K)."""
    wanted = -(-HARDWARE[architecture(device)].processors // tiles)
    return max(1, min(wanted, -(-width // (4 * entry.depth))))
