"""Compiles every Triton kernel for GPUs that are not here, and reads what the assemblers say: `make kernels-check`.

The launchers themselves run, on small CPU tensors, with a driver that names the target and a launch that compiles and
stops: what is checked is what would be launched, table entry by table entry. Fails where a register spills, shared
memory passes the published limit, registers pass 255 a thread, or a matrix product misses the tensor cores.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.suite import ROOT, Case, Run
from thesean.kernels.shared import launches
from thesean.kernels.shared.launches import HARDWARE, Arch

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

CACHE = ROOT / "build" / "triton"
MAX_REGISTERS = 255  # a thread's, on NVIDIA; AMD's CDNA has 256 and as many accumulators
# mma.sync, wgmma, tcgen05 in PTX; matrix fused multiply-add in AMD's assembly
MATRIX_INSTRUCTION = {"cuda": r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", "hip": r"\bv_mfma_\S+"}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one kernel needs on one architecture, as its assembler reports it."""

    kernel: str
    arch: Arch
    dtype: str
    variant: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str | None
    claims_matrix: bool
    seconds: float

    def faults(self) -> list[str]:
        limit = HARDWARE[self.arch].shared_bytes
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if not 0 < self.registers <= MAX_REGISTERS:
            found.append(f"{self.registers} registers, expected 1 to {MAX_REGISTERS}")
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {limit}")
        if self.claims_matrix and self.matrix_instruction is None:
            found.append("no tensor-core instruction")
        return found


class _Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return hash((self.target.backend, self.target.arch))  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: Arch) -> Iterator[list[tuple[str, dict[str, Any], Any, float]]]:
    """Launches compile for `arch` and don't run: their outputs stay as they were allocated.

    Yields the list that compiled kernels are added to: name, keyword arguments, kernel, seconds.
    """
    # triton is for Linux alone, and this file is listed everywhere
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from thesean.kernels import dmnn_triton, linear_recurrence_triton
    from thesean.kernels.shared import grams_triton

    hardware, launch, found = HARDWARE[arch], JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        started = time.perf_counter()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, options, kernel, time.perf_counter() - started))
        return kernel

    driver.set_active(_Driver(GPUTarget(hardware.backend, hardware.arch, hardware.warp_size)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(launches, "architecture", return_value=arch))
        for module in (grams_triton, dmnn_triton, linear_recurrence_triton):
            stack.enter_context(mock.patch.object(module, "device_of", return_value=contextlib.nullcontext()))
        yield found


def run_recurrence(dtype: torch.dtype) -> None:
    from thesean.kernels import linear_recurrence_triton

    decay_BTD, input_BTD = (torch.rand(2, 32, 256).to(dtype).requires_grad_() for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    state_BD = torch.zeros(2, 256, dtype=wide, requires_grad=True)
    hidden_BTD, last_BD = linear_recurrence_triton.linear_recurrence(decay_BTD, input_BTD, state_BD)
    (hidden_BTD.sum() + last_BD.sum()).backward()


def run_gram_pair(dtype: torch.dtype, slices: int, stored: bool) -> None:
    from thesean.kernels.shared import grams_triton

    x_NP = torch.rand(64, 512).to(dtype)
    with mock.patch.object(grams_triton, "slices", return_value=slices):
        grams_triton.gram_pair(x_NP, None if stored else x_NP, torch.rand(64, 64) if stored else None)


def run_apart() -> None:
    from thesean.kernels.shared import grams_triton

    grams_triton.apart_sums(torch.rand(64, 64), torch.rand(64, 64), torch.ones(2))


def run_dmnn(prepared: bool) -> None:
    from thesean.kernels import dmnn_triton

    x_NP, y_NQ = (torch.rand(256, 32, requires_grad=True) for _ in range(2))
    y = torch.rand(256, 256) if prepared else y_NQ
    dmnn_triton.dmnn_distance(x_NP, y, temperature=0.1, prepared=prepared).backward()


def runs() -> Iterator[tuple[str, torch.dtype, str, Callable[[], None]]]:
    """Every table entry, in every variant that is launched."""
    for dtype in (*launches.DTYPES, torch.float64):
        yield "linear_recurrence", dtype, "", partial(run_recurrence, dtype)
    for dtype in launches.DTYPES:
        yield "cka", dtype, "", partial(run_gram_pair, dtype, 1, False)
        yield "cka", dtype, "split", partial(run_gram_pair, dtype, 2, False)
    yield "cka", torch.float32, "stored guide", partial(run_gram_pair, torch.float32, 2, True)
    yield "gram_statistics", torch.float32, "", run_apart
    yield "dmnn", torch.float32, "", partial(run_dmnn, False)
    yield "dmnn", torch.float32, "stored guide", partial(run_dmnn, True)


def resources(kernel: Any, arch: Arch) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as ptxas or AMD's metadata tell them."""
    if HARDWARE[arch].backend == "hip":
        text = kernel.asm["amdgcn"]

        def read(name: str) -> int:
            return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

        spilled = 4 * (read("vgpr_spill_count") + read("sgpr_spill_count"))
        # vgpr_count holds both kinds; each kind has a file of 256
        return read("vgpr_count"), max(spilled, read("private_segment_fixed_size"))
    import triton

    number = int(HARDWARE[arch].arch)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if number >= 90 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = f"sm_{number}{'a' if number >= 90 else ''}"
        command = [str(ptxas), "-v", f"--gpu-name={target}", str(source), "-o", f"{source}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(registers), sum(map(int, spills))


def check(arch: Arch, dtypes: Sequence[torch.dtype]) -> list[Compiled]:
    rows: dict[tuple[str, ...], Compiled] = {}
    backend = HARDWARE[arch].backend
    for op, dtype, variant, launch in runs():
        if dtype not in dtypes:
            continue
        with compiling(arch) as found:
            launch()
        for name, options, kernel, seconds in found:
            key = (name, kernel.hash)
            if key in rows:
                continue  # the slices of y, after those of x, or another operation's
            registers, spilled = resources(kernel, arch)
            text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
            matrix = re.search(MATRIX_INSTRUCTION[backend], text)
            rows[key] = Compiled(
                kernel=f"{op}: {name.removesuffix('_kernel')}",
                arch=arch,
                dtype=str(dtype).removeprefix("torch."),
                variant=variant,
                warps=options["num_warps"],
                registers=registers,
                spilled_bytes=spilled,
                shared_bytes=kernel.metadata.shared,
                matrix_instruction=matrix[0] if matrix else None,
                claims_matrix="PREC" in options,
                seconds=round(seconds, 2),
            )
    return list(rows.values())


def bench(run: Run) -> None:
    import triton

    triton.knobs.cache.dir = str(CACHE)
    run.keep(
        triton=metadata.version("triton"),
        measured="compiled ahead of time without a GPU; no kernel has run on one",
        max_registers=MAX_REGISTERS,
        shared_limit_bytes={arch: HARDWARE[arch].shared_bytes for arch in HARDWARE},
    )
    dtypes = [getattr(torch, name) for name in run.settings["dtypes"]]
    for arch in HARDWARE:
        if not run.wants(arch):
            continue
        seen: Counter[str] = Counter()
        for row in check(arch, dtypes):
            name = f"{arch}, {row.kernel}, {row.variant or 'plain'}, {row.dtype}"
            seen[name] += 1
            if seen[name] > 1:  # one operation may launch a kernel in two shapes
                name = f"{name}, {seen[name]}"
            # how long it took to compile depends on what the cache held
            run.add(name, **{k: v for k, v in asdict(row).items() if k != "seconds"})
            for fault in row.faults():
                run.fault(f"{name}: {fault}")


CASE = Case(
    question="What do the Triton kernels need of GPUs that are not here: registers, shared memory, tensor cores?",
    minutes=1,
    unit="registers and bytes",
    run=bench,
    settings={"dtypes": ["float32", "float16", "bfloat16", "float64"]},
    quick={"dtypes": ["float32"]},
    quick_only=("sm90",),
    needs=("triton",),
)
