"""Times the Triton kernels on a GPU against torch.compile of the reference: `python benchmarks/bench_kernels.py`.

CUDA events, the cache flushed before every run, median with 20th and 80th percentile, forward plus backward; bandwidth
counts each input and output once, arithmetic the matrix products alone. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from thesean.kernels.cka import cka, cka_distance
from thesean.kernels.dmnn import dmnn
from thesean.kernels.linear_recurrence import linear_recurrence
from thesean.kernels.shared.dispatch import Backend
from thesean.report.environment import environment

UNROLLED = 512  # steps: torch.compile unrolls the reference's loop, and takes an hour for thousands
NO_GPU = (
    "No GPU here: nothing was timed, and no figure of the Triton kernels on a GPU has been measured yet. "
    "What is proven without one: `make kernels-interpret` and `make kernels-check`."
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size. `run(backend)` is its forward and backward."""

    name: str
    run: Callable[[str], None]
    bytes_moved: int
    flops: int
    implementations: tuple[str, ...] = ("torch.compile", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Timing:
    case: str
    implementation: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float
    tflop_per_s: float


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for batch, time, width in ((8, 4096, 1024), (32, 512, 768)):
            elements = batch * time * width
            yield Case(
                name=f"linear_recurrence B={batch} T={time} D={width} {name}",
                run=recurrence(batch, time, width, dtype),
                bytes_moved=(3 + 5) * elements * dtype.itemsize,  # decay, input, hidden; then 3 in and 2 out
                flops=6 * elements,
                implementations=("torch.compile", "torch", "triton") if time <= UNROLLED else ("torch", "triton"),
            )
        for n, width in ((256, 4096), (2048, 2048)):
            products = 2 * n * n * width  # multiply and add, of one Gram
            for op in (cka, cka_distance):
                yield Case(
                    name=f"{op.__name__} N={n} P=Q={width} {name}",
                    run=similarity(op, n, width, dtype),
                    bytes_moved=4 * n * width * dtype.itemsize,
                    flops=4 * products,
                )
    for n, width in ((256, 4096), (2048, 2048)):
        yield Case(
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


def timed(case: Case, implementation: str, repeats: int) -> Timing:
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than any cache
    for _ in range(3):
        case.run(implementation)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        case.run(implementation)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    p20, median, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(
        case=case.name,
        implementation=implementation,
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        gb_per_s=case.bytes_moved / median / 1e6,
        tflop_per_s=case.flops / median / 1e9,
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args(argv)
    report: dict[str, object] = {"environment": environment()}
    if torch.cuda.is_available():
        limits = device_limits()
        report |= {"device": limits, "timings": []}
        print(f"{limits['name']}, memory at most {limits['memory_gb_per_s']:.0f} GB/s")
        rows = []
        for case in cases():
            torch.compiler.reset()  # each case compiles a function of its own, and torch gives up after eight
            for implementation in case.implementations:
                row = timed(case, implementation, arguments.repeats)
                rows.append(asdict(row))
                print(
                    f"{row.case:48}{row.implementation:15}{row.median_ms:9.3f} ms [{row.p20_ms:.3f}, {row.p80_ms:.3f}]"
                    f"{row.gb_per_s:8.0f} GB/s{row.tflop_per_s:8.1f} TFLOP/s",
                    flush=True,
                )
        report["timings"] = rows
    else:
        report["measured"] = None
        report["note"] = NO_GPU
        print(NO_GPU)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
