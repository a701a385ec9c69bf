"""What is in force around a call: modes, default dtypes and devices of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import thesean
from benchmarks.hostility.guides import QUICK, Blocks, compiled, seeded, sound, vectors
from benchmarks.hostility.trial import Call, Inputs, check


def all_in_inference_mode(folder: Path) -> None:
    with torch.inference_mode():
        compiled()


def in_inference_mode(folder: Path) -> None:
    guide, data = seeded(Blocks), vectors()
    with torch.inference_mode():
        converted = compiled(guide, data=data)
    check(all(not p.is_inference() for p in converted.module.parameters()), "weights that can't be trained")
    converted(vectors(1)[0]).square().mean().backward()


def without_gradients(folder: Path) -> None:
    with torch.no_grad():
        compiled()


def defaulting(dtype: torch.dtype) -> Call:
    """The process's default dtype is another; results are those of the usual one."""

    def calling(folder: Path) -> None:
        usual = compiled()
        guide, data = seeded(Blocks), vectors()
        torch.set_default_dtype(dtype)
        try:
            found = compiled(guide, data=data)
            check(torch.get_default_dtype() == dtype, "the default dtype changed")
            there = found(data[0])
        finally:
            torch.set_default_dtype(torch.float32)
        check({p.dtype for p in found.module.parameters()} == {torch.float32}, "weights of another dtype")
        check(torch.equal(there, found(data[0])), "numbers that depend on the default dtype")
        difference = (there - usual(data[0])).abs().max()
        check(difference < 1e-3, f"other numbers than in float32: {difference:.1e} apart")

    return calling


def on_cuda(folder: Path) -> None:
    """Where there is a GPU it is right, and else an error of ours."""
    compiled(data=[x.cuda() for x in vectors()] if torch.cuda.is_available() else cuda_batches())


def cuda_batches() -> list[Any]:
    class Cuda(torch.Tensor):
        """What a batch says that was made on another machine."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    return [*vectors(8), vectors(1)[0].as_subclass(Cuda)]


def with_default_device(folder: Path) -> None:
    guide, data = seeded(Blocks), vectors()
    with torch.device("meta"):
        converted = thesean.compile(guide, "narrow", data=data, recipe=QUICK, progress=False)
    sound(converted)


def under_autocast(folder: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        compiled()


def deterministic(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        compiled()
    finally:
        torch.use_deterministic_algorithms(False)


def with_anomalies_detected(folder: Path) -> None:
    with torch.autograd.set_detect_anomaly(True):
        compiled()


AROUND: Inputs = {
    "inference mode around the call": in_inference_mode,
    "inference mode around the guide too": all_in_inference_mode,
    "no_grad around the call": without_gradients,
    "a default dtype of float64": defaulting(torch.float64),
    "a default dtype of bfloat16": defaulting(torch.bfloat16),
    "a default dtype of float16": defaulting(torch.float16),
    "cuda where there is none": on_cuda,
    "a default device of meta": with_default_device,
    "autocast around the call": under_autocast,
    "deterministic algorithms": deterministic,
    "anomaly detection": with_anomalies_detected,
}
