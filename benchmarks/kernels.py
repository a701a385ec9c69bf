"""Times the Triton kernels on a GPU against torch.compile of the reference.

CUDA events, the cache flushed before every run, median with 20th and 80th percentile, forward plus backward; bandwidth
counts each input and output once, arithmetic the matrix products alone. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

import torch

from benchmarks.suite import Case, Run, percentiles
from thesean.kernels.cka import cka, cka_distance
from thesean.kernels.dmnn import dmnn
from thesean.kernels.linear_recurrence import linear_recurrence
from thesean.kernels.shared.dispatch import Backend

UNROLLED = 512  # steps: torch.compile unrolls the reference's loop, and takes an hour for thousands
NO_GPU = (
    "No GPU here: nothing was timed, and no figure of the Triton kernels on a GPU has been measured yet. "
    "What is proven without one: `make kernels-interpret` and `make kernels-check`."
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation at one size. `run(backend)` is its forward and backward."""

    name: str
    run: Callable[[str], None]
    bytes_moved: int
    flops: int
    implementations: tuple[str, ...] = ("torch.compile", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Timing:
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float
    tflop_per_s: float


def operations() -> Iterator[Operation]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for batch, time, width in ((8, 4096, 1024), (32, 512, 768)):
            elements = batch * time * width
            yield Operation(
                name=f"linear_recurrence B={batch} T={time} D={width} {name}",
                run=recurrence(batch, time, width, dtype),
                bytes_moved=(3 + 5) * elements * dtype.itemsize,  # decay, input, hidden; then 3 in and 2 out
                flops=6 * elements,
                implementations=("torch.compile", "torch", "triton") if time <= UNROLLED else ("torch", "triton"),
            )
        for n, width in ((256, 4096), (2048, 2048)):
            products = 2 * n * n * width  # multiply and add, of one Gram
            for op in (cka, cka_distance):
                yield Operation(
                    name=f"{op.__name__} N={n} P=Q={width} {name}",
                    run=similarity(op, n, width, dtype),
                    bytes_moved=4 * n * width * dtype.itemsize,
                    flops=4 * products,
                )
    for n, width in ((256, 4096), (2048, 2048)):
        yield Operation(
            name=f"dmnn N={n} P=Q={width} float32",
            run=similarity(dmnn, n, width, torch.float32),
            bytes_moved=4 * n * width * 4,
            flops=8 * n * n * width,
        )


def recurrence(batch: int, time: int, width: int, dtype: torch.dtype) -> Callable[[str], None]:
    device = torch.device("cuda")
    decay_BTD = torch.rand(batch, time, width, device=device).to(dtype).requires_grad_()
    input_BTD = torch.randn(batch, time, width, device=device).to(dtype).requires_grad_()
    state_BD = torch.zeros(batch, width, device=device, requires_grad=True)
    grad_BTD = torch.randn_like(input_BTD)
    compiled = torch.compile(partial(linear_recurrence, backend="torch"))

    def run(backend: str) -> None:
        step = compiled if backend == "torch.compile" else partial(linear_recurrence, backend=cast(Backend, backend))
        hidden_BTD, _ = step(decay_BTD, input_BTD, state_BD)
        torch.autograd.grad(hidden_BTD, [decay_BTD, input_BTD, state_BD], grad_BTD)

    return run


def similarity(op: Callable[..., torch.Tensor], n: int, width: int, dtype: torch.dtype) -> Callable[[str], None]:
    x_NP, y_NQ = (torch.randn(n, width, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    compiled = torch.compile(partial(op, backend="torch"))

    def run(backend: str) -> None:
        value = compiled(x_NP, y_NQ) if backend == "torch.compile" else op(x_NP, y_NQ, backend=backend)
        torch.autograd.grad(value, [x_NP, y_NQ])

    return run


def timed(operation: Operation, implementation: str, repeats: int) -> Timing:
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than any cache
    for _ in range(3):
        operation.run(implementation)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        operation.run(implementation)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    median, p20, p80 = percentiles(times)
    return Timing(
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        gb_per_s=operation.bytes_moved / median / 1e6,
        tflop_per_s=operation.flops / median / 1e9,
    )


def device_limits() -> dict[str, float | str]:
    """What the figures are to be read against."""
    properties = torch.cuda.get_device_properties(0)
    clock_khz, bus_bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_gb_per_s": 2 * clock_khz * bus_bits / 8 / 1e6,  # two transfers a clock
    }


def bench(run: Run) -> None:
    if not torch.cuda.is_available():
        run.keep(note=NO_GPU)
        print(NO_GPU)
        return
    run.keep(device=device_limits())
    for operation in operations():
        torch.compiler.reset()  # each case compiles a function of its own, and torch gives up after eight
        for implementation in operation.implementations:
            name = f"{operation.name}, {implementation}"
            if run.wants(name):
                run.add(name, **asdict(timed(operation, implementation, run.settings["repeats"])))


CASE = Case(
    question="Are the Triton kernels faster on a GPU than torch.compile of their references?",
    minutes=10,
    unit="ms",
    run=bench,
    settings={"repeats": 50},
    quick={"repeats": 2},
    quick_only=("linear_recurrence B=32", "cka N=256"),
)
