"""Arguments of `compile`, `plan`, `baseline` and `compare` that a hurried or a malicious caller gives.

B batch, T time, D width
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.hostility.guides import (
    POSITIONS,
    QUICK,
    WIDTH,
    WORDS,
    Blocks,
    Words,
    compiled,
    ids,
    seeded,
    sound,
    vectors,
)
from benchmarks.hostility.trial import Call, Inputs, check, only_typed


def said(target: Any = "narrow", **arguments: Any) -> Call:
    """`compile` with these arguments: an error, or a result that is right all the same."""
    return lambda folder: compiled(None, target, **arguments)


def refused(target: Any = "narrow", **arguments: Any) -> Call:
    return only_typed(said(target, **arguments))


def worded(**arguments: Any) -> Call:
    """As `said`, of a guide that takes ids."""
    return lambda folder: compiled(seeded(Words), **{"data": ids(), **arguments})


def built(build: Any) -> thesean.Target:
    """A target that is a function of the caller's."""
    return thesean.Target("mine", build=build)


class Endless:
    """Batches without an end."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for k in itertools.count():
            yield torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(k))


class Once:
    """Says that it can be iterated, and can be so once."""

    def __init__(self) -> None:
        self.left = iter(vectors())

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.left


class Failing:
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from vectors(2)
        raise OSError("the disk with the data is gone")


def square(output: Any, batch: Any) -> torch.Tensor:
    return output.square().mean()


def changed(value: torch.Tensor, number: float) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] = number
    return value


SAME = {
    "seed is a string": refused(seed="1"),
    "seed is a float": refused(seed=1.5),
    "seed is None": refused(seed=None),
    "seed is True": refused(seed=True),
    "seed is negative": said(seed=-1),
    "seed is 2**63": said(seed=2**63),
    "seed is 2**64 and more": said(seed=2**64 + 1),
    "target is None": refused(None),
    "target is a number": refused(3),
    "target is empty": refused(""),
    "target is misspelt": refused("narow"),
    "target is bytes": refused(b"narrow"),
    "target is a class": refused(nn.Linear),
    "target is an empty dict": refused({}),
    "target is a dict to nothing": refused({"*": None}),
    "target is a dict of a glob without a match": refused({"none.*": "narrow"}),
    "target is a list": refused(["narrow"]),
    "target keeps all": refused("keep"),
    "target has an unknown option": lambda folder: compiled(None, thesean.Target("narrow", what=1)),
    "target has a negative width": lambda folder: compiled(None, thesean.Target("mlp", width=-1)),
    "target has a width of zero": lambda folder: compiled(None, thesean.Target("mlp", width=0)),
    "target has a width of NaN": lambda folder: compiled(None, thesean.Target("mlp", width=float("nan"))),
    "target has a width of 2**62": lambda folder: compiled(None, thesean.Target("mlp", width=2**62)),
    "target has a width that is a string": lambda folder: compiled(None, thesean.Target("mlp", width="wide")),
    "target builds nothing": lambda folder: compiled(None, built(lambda part: None)),
    "target builds a failure": lambda folder: compiled(None, built(lambda part: 1 / 0)),
    "target builds other shapes": lambda folder: compiled(None, built(lambda part: nn.Linear(WIDTH, 3))),
    "target builds NaN": only_typed(lambda folder: compiled(None, built(lambda part: Broken()))),
    "model is None": only_typed(lambda folder: thesean.compile(None, "narrow", data=vectors())),  # type: ignore[arg-type]
    "model is a class": only_typed(lambda folder: thesean.compile(Blocks, "narrow", data=vectors())),  # type: ignore[arg-type]
    "model is a function": only_typed(lambda folder: thesean.compile(torch.relu, "narrow", data=vectors())),  # type: ignore[arg-type]
    "model has no parameters": lambda folder: compiled(nn.ReLU()),
    "model is empty": lambda folder: compiled(nn.Sequential()),
    "model returns nothing": lambda folder: compiled(Returning(lambda x: None)),
    "model returns a string": lambda folder: compiled(Returning(lambda x: "x")),
    "model returns a number": lambda folder: compiled(Returning(lambda x: 3.0)),
    "model returns NaN": only_typed(lambda folder: compiled(Returning(lambda x: x * float("nan")))),
    "model raises": only_typed(lambda folder: compiled(Returning(lambda x: 1 / 0))),
    "model is random": lambda folder: compiled(Returning(lambda x: x + torch.rand_like(x))),
    "weights are NaN": only_typed(lambda folder: compiled(filled(float("nan")))),
    "weights are infinite": only_typed(lambda folder: compiled(filled(float("inf")))),
    "weights are zero": lambda folder: compiled(filled(0.0)),
    "weights are huge": lambda folder: compiled(filled(1e30)),
    "weights are integers": lambda folder: compiled(quantised()),
}

DATA = {
    "data is a string": refused(data="batches"),
    "data is a number": refused(data=7),
    "data is a tensor": refused(data=torch.zeros(4, 6, WIDTH)),
    "data is empty": refused(data=[]),
    "data is a generator": refused(data=(x for x in vectors())),
    "data is a dict": refused(data={"x": torch.zeros(4, 6, WIDTH)}),
    "data can be read once": said(data=Once()),
    "data is endless": said(data=Endless()),
    "data is endless, with eval_data": said(data=Endless(), eval_data=vectors(2)),
    "data fails after two batches": said(data=Failing()),
    "data holds None": refused(data=[None]),
    "data holds strings": refused(data=["a", "b"]),
    "data holds lists of numbers": refused(data=[[1.0, 2.0]]),
    "data holds arrays": lambda folder: compiled(data=[x.numpy() for x in vectors()]),
    "data holds None among batches": refused(data=[*vectors(8), None]),
    "data holds an empty tuple": refused(data=[()]),
    "data holds an empty dict": refused(data=[{}]),
    "data holds an empty batch": refused(data=[torch.zeros(0, 6, WIDTH)]),
    "data holds an empty batch later": said(data=[*vectors(8), torch.zeros(0, 6, WIDTH)]),
    "data holds an empty batch in the middle": said(data=[*vectors(3), torch.zeros(0, 6, WIDTH), *vectors(6)]),
    "data holds batches of no steps": refused(data=[torch.zeros(4, 0, WIDTH)]),
    "data holds a batch of no steps later": said(data=[*vectors(3), torch.zeros(4, 0, WIDTH), *vectors(6)]),
    "data holds one row": said(data=[torch.randn(1, 6, WIDTH)]),
    "data holds one step": said(data=[torch.randn(4, 1, WIDTH)]),
    "data holds one number": refused(data=[torch.zeros(())]),
    "data holds another width": refused(data=[torch.zeros(4, 6, WIDTH + 1)]),
    "data holds another width later": refused(data=[*vectors(8), torch.zeros(4, 6, WIDTH + 1)]),
    "data holds another rank later": refused(data=[*vectors(8), torch.zeros(6, WIDTH)]),
    "data holds doubles": refused(data=[x.double() for x in vectors()]),
    "data holds doubles later": refused(data=[*vectors(8), vectors(1)[0].double()]),
    "data holds halves": refused(data=[x.half() for x in vectors()]),
    "data holds integers": refused(data=[x.long() for x in vectors()]),
    "data holds complex numbers": refused(data=[x.to(torch.complex64) for x in vectors()]),
    "data holds booleans": refused(data=[x > 0 for x in vectors()]),
    "data holds sparse tensors": said(data=[x.to_sparse() for x in vectors()]),
    "data holds tensors of the meta device": refused(data=[x.to("meta") for x in vectors()]),
    "data holds tensors with gradients": said(data=[x.requires_grad_() for x in vectors()]),
    "data holds NaN": refused(data=[x * float("nan") for x in vectors()]),
    "data holds NaN later": said(data=[*vectors(3), changed(vectors(1)[0], float("nan")), *vectors(6)]),
    "data holds infinity later": said(data=[*vectors(3), changed(vectors(1)[0], float("inf")), *vectors(6)]),
    "data holds NaN among what is held out": said(data=[*vectors(8), changed(vectors(1)[0], float("nan"))]),
    "data holds huge numbers": said(data=[x * 1e30 for x in vectors()]),
    "data holds zeros": said(data=[torch.zeros(4, 6, WIDTH)] * 9),
    "data holds the same row": said(data=[torch.ones(4, 6, WIDTH)] * 9),
    "data holds expanded views": said(data=[torch.randn(1, 1, WIDTH).expand(4, 6, WIDTH)] * 9),
    "data was made in inference mode": lambda folder: compiled(data=inferred()),
    "data changes its length": said(data=[torch.randn(4, 2 + k, WIDTH) for k in range(9)]),
    "eval_data is a string": refused(eval_data="batches"),
    "eval_data is empty": refused(eval_data=[]),
    "eval_data is endless": said(eval_data=Endless()),
    "eval_data is a generator": refused(eval_data=(x for x in vectors())),
    "eval_data has another width": refused(eval_data=[torch.zeros(4, 6, WIDTH + 1)]),
    "eval_data holds an empty batch": said(eval_data=[torch.zeros(0, 6, WIDTH)]),
    "eval_data holds NaN": said(eval_data=[x * float("nan") for x in vectors(2)]),
    "eval_data is a number": refused(eval_data=5),
    "example_inputs is a string": refused(example_inputs="x"),
    "example_inputs is empty": refused(example_inputs=()),
    "example_inputs is too many": refused(example_inputs=(vectors(1)[0], vectors(1)[0])),
    "example_inputs has another name": refused(example_inputs={"y": vectors(1)[0]}),
    "example_inputs is None in a tuple": refused(example_inputs=(None,)),
}

IDS = {
    "an id past the table": only_typed(worded(data=[changed(x, WORDS) for x in ids()])),
    "an id past the table in a later batch": only_typed(worded(data=[*ids(3), changed(ids(1)[0], WORDS), *ids(6)])),
    "an id past the table in the last batch": only_typed(worded(data=[*ids(8), changed(ids(1)[0], WORDS + 5)])),
    "a negative id": only_typed(worded(data=[changed(x, -1) for x in ids()])),
    "a negative id in a later batch": only_typed(worded(data=[*ids(3), changed(ids(1)[0], -100), *ids(6)])),
    "an id past the table in eval_data": only_typed(worded(eval_data=[changed(ids(1)[0], WORDS)])),
    "the greatest id that there is": only_typed(worded(data=[*ids(8), changed(ids(1)[0], 2**63 - 1)])),
    "ids of 32 bits": worded(data=[x.int() for x in ids()]),
    "ids of 8 bits": worded(data=[x.to(torch.uint8) for x in ids()]),
    "ids that are floats": only_typed(worded(data=[x.float() for x in ids()])),
    "a sequence past the table of positions": only_typed(worded(data=ids(time=POSITIONS + 1))),
    "a sequence past the table in a later batch": only_typed(worded(data=[*ids(8), *ids(1, time=POSITIONS + 1)])),
    "a sequence past the table in the middle": only_typed(worded(data=[*ids(3), *ids(1, time=POSITIONS + 1), *ids(6)])),
    "a sequence past the table in eval_data": only_typed(worded(eval_data=ids(2, time=POSITIONS + 1))),
    "labels past the classes": worded(data=[(x, changed(x, WORDS)) for x in ids()], loss=thesean.cross_entropy),
    "labels that are negative": worded(data=[(x, changed(x, -7)) for x in ids()], loss=thesean.cross_entropy),
    "labels of another shape": worded(data=[(x, x[:, :2]) for x in ids()], loss=thesean.cross_entropy),
    "labels that are strings": worded(data=[(x, "yes") for x in ids()], loss=thesean.cross_entropy),
    "labels that are missing": worded(loss=thesean.cross_entropy),
}

TASK = {
    "loss is a string": refused(loss="mse"),
    "loss is a number": refused(loss=1.0),
    "loss takes one argument": refused(loss=lambda output: output.mean()),
    "loss takes none": refused(loss=lambda: 0.0),
    "loss is a vector": refused(loss=lambda output, batch: output.square().mean(-1)),
    "loss is a vector of one": said(loss=lambda output, batch: output.square().mean().reshape(1)),
    "loss is None": refused(loss=lambda output, batch: None),
    "loss is a float": refused(loss=lambda output, batch: 0.5),
    "loss is a string at the end": refused(loss=lambda output, batch: "0.5"),
    "loss is a tuple": refused(loss=lambda output, batch: (output.mean(), 1)),
    "loss is detached": refused(loss=lambda output, batch: output.mean().detach()),
    "loss is a constant tensor": refused(loss=lambda output, batch: torch.tensor(1.0)),
    "loss is NaN": refused(loss=lambda output, batch: output.mean() * float("nan")),
    "loss is infinite": refused(loss=lambda output, batch: output.square().mean() + float("inf")),
    "loss is an integer tensor": refused(loss=lambda output, batch: output.long().sum()),
    "loss is complex": refused(loss=lambda output, batch: output.mean().to(torch.complex64)),
    "loss raises": refused(loss=lambda output, batch: 1 / 0),
    "loss reads a label that is not there": refused(loss=lambda output, batch: output.mean() - batch["y"].mean()),
    "loss switches gradients off": said(loss=lambda output, batch: (torch.set_grad_enabled(False), output.mean())[1]),
    "loss writes into its output": said(loss=lambda output, batch: output.mul_(0).sum()),
    "loss writes into the batch": said(loss=lambda output, batch: (batch.zero_(), output.square().mean())[1]),
    "loss calls backward": said(loss=lambda output, batch: (output.square().mean().backward(), output.mean())[1]),
    "loss of a type": refused(loss=int),
    "metric is a string": refused(metric="accuracy"),
    "metric is a number": refused(metric=1.0),
    "metric takes one argument": refused(metric=lambda output: 1.0),
    "metric is a string at the end": refused(loss=square, metric=lambda output, batch: "high"),
    "metric is None": refused(loss=square, metric=lambda output, batch: None),
    "metric is a tensor": said(loss=square, metric=lambda output, batch: output.mean().detach()),
    "metric is a tensor with a gradient": said(loss=square, metric=lambda output, batch: output.mean()),
    "metric is a vector": refused(loss=square, metric=lambda output, batch: output),
    "metric is a list": refused(loss=square, metric=lambda output, batch: [1.0]),
    "metric is NaN": said(loss=square, metric=lambda output, batch: float("nan")),
    "metric is complex": refused(loss=square, metric=lambda output, batch: 1j),
    "metric raises": refused(loss=square, metric=lambda output, batch: 1 / 0),
    "inputs is a string": refused(inputs="x"),
    "inputs returns nothing": refused(inputs=lambda batch: None),
    "inputs raises": refused(inputs=lambda batch: batch["x"]),
    "labels is a string": refused(labels="y", loss=square),
    "labels raises": refused(labels=lambda batch: batch["y"], loss=lambda output, batch: output.mean()),
    "labels returns nothing": said(labels=lambda batch: None, loss=lambda output, batch: output.square().mean()),
    "outputs is a string": refused(outputs="softmax"),
    "outputs names what is not there": refused(outputs={"logits": "softmax"}),
    "outputs has an unknown kind": refused(outputs={"output": "l3"}),
    "outputs ignores all": said(outputs={"output": "ignore"}),
}

PLAN = {
    "parts is a number": refused(parts=3),
    "parts has no match": refused(parts=["nothing.*"]),
    "parts is empty": said(parts=[]),
    "parts is a string": said(parts="blocks.0"),
    "parts is a broken glob": refused(parts=["[blocks"]),
    "parts is a thousand stars": refused(parts=["*a" * 1000]),
    "keep is a number": refused(keep=3),
    "keep has no match": refused(keep=["nothing.*"]),
    "keep is all": refused(keep=["*"]),
    "granularity is misspelt": refused(granularity="blocks"),
    "granularity is a number": refused(granularity=3),
    "granularity is a list": refused(granularity=["block"]),
    "merge is zero": refused(merge=0),
    "merge is negative": refused(merge=-1),
    "merge is a string": refused(merge="2"),
    "merge is a float": refused(merge=1.5),
    "merge is a million": said(merge=10**6),
    "target_parts is zero": refused(target_parts=0),
    "target_parts is a million": said(target_parts=10**6),
    "merge and target_parts": refused(merge=2, target_parts=1),
    "constraints without auto": refused(constraints={"speedup": 2.0}),
    "constraints are unknown": refused("auto", constraints={"speed": 2.0}),
    "constraints are empty": refused("auto", constraints={}),
    "constraints are a number": refused("auto", constraints=2.0),
    "constraints are negative": refused("auto", constraints={"params": -1}),
    "constraints are NaN": refused("auto", constraints={"speedup": float("nan")}),
    "constraints are infinite": refused("auto", constraints={"speedup": float("inf")}),
    "constraints are a string": refused("auto", constraints={"latency_ms": "fast"}),
    "candidates are a string": refused("auto", constraints={"params": 10}, candidates="narow"),
    "candidates are empty": refused("auto", constraints={"params": 10}, candidates=[]),
    "dynamic is a string": refused(dynamic="x"),
    "dynamic names no input": refused(dynamic={"y": {0: "batch"}}),
    "dynamic names no dimension": refused(dynamic={"x": {7: "batch"}}),
    "dynamic is a list": refused(dynamic=[("x", 0)]),
    "dynamic has a number for a name": refused(dynamic={"x": {0: 3}}),
    "dynamic has a negative dimension": said(dynamic={"x": {-3: "batch"}}),
    "dynamic has a name of code": said(dynamic={"x": {0: "__import__('os')"}}),
    "dynamic frees a fixed width": said(dynamic={"x": {2: "width"}}),
    "recipe is unknown": refused(recipe="slow"),
    "recipe is a number": refused(recipe=3),
    "recipe is a list": refused(recipe=["fast"]),
    "recipe is a file that is not there": refused(recipe="none.yaml"),
    "recipe has an unknown setting": refused(recipe={"step": 3}),
    "recipe has negative steps": refused(recipe={"steps": -3}),
    "recipe has steps of NaN": refused(recipe={"steps": float("nan")}),
    "recipe has a learning rate of zero": said(recipe={"steps": 4, "alignment": {"learning_rate": 0.0}}),
    "recipe has a learning rate of NaN": refused(recipe={"steps": 4, "alignment": {"learning_rate": float("nan")}}),
    "recipe has a learning rate of 1e30": said(recipe={"steps": 4, "fine_tuning": {"learning_rate": 1e30}}),
    "recipe has an infinite learning rate": refused(recipe={"steps": 4, "alignment": {"learning_rate": float("inf")}}),
    "recipe has an unknown measure": refused(recipe={"alignment": {"measure": "kca"}}),
    "recipe has a share of 2": refused(recipe={"alignment": {"share": 2.0}}),
    "plan is a number": refused("rnn", plan=3),
    "plan is a file that is not there": refused("rnn", plan="none.yaml"),
    "plan is text": refused("rnn", plan="parts: [\n"),
    "plan and target": lambda folder: compiled(
        None, "mlp", plan=thesean.plan(seeded(Blocks), "narrow", example_inputs=vectors(1)[0])
    ),
    "plan of another guide": lambda folder: only_typed(
        lambda _: compiled(seeded(Words), "rnn", data=ids(), plan=other_plan())
    )(folder),
    "workdir is a number": refused(workdir=3),
    "workdir is a file": refused(workdir="notes.txt"),
    "workdir is below a file": refused(workdir="notes.txt/work"),
    "workdir has a NUL": refused(workdir="a\0b"),
    "workdir has a long name": refused(workdir="x" * 300),
    "workdir is bytes": refused(workdir=b"work"),
    "workdir is empty": said(workdir=""),
    "dump_graphs is a number": refused(dump_graphs=3),
    "dump_graphs is a file": refused(dump_graphs="notes.txt"),
    "dump_graphs has a NUL": refused(dump_graphs="a\0b"),
    "progress is a string": said(progress="no"),
    "context is negative": only_typed(lambda folder: planned(context=-1)),
    "context is a string": only_typed(lambda folder: planned(context="64")),
    "batch is zero": only_typed(lambda folder: planned(batch=0)),
    "context is infinite": only_typed(lambda folder: planned(context=float("inf"))),
    "kind of a baseline is unknown": only_typed(lambda folder: baseline(kind="scrath")),
    "learning rate of a baseline is NaN": only_typed(
        lambda folder: baseline(kind="scratch", loss=square, learning_rate=float("nan"))
    ),
    "learning rate of a baseline is negative": only_typed(
        lambda folder: baseline(kind="scratch", loss=square, learning_rate=-1.0)
    ),
    "a baseline from scratch has no loss": only_typed(lambda folder: baseline(kind="scratch")),
}


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


class Returning(nn.Module):
    """Blocks, and then what a function makes of its output."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.body, self.last = seeded(Blocks), last

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.body(x))


def filled(value: float) -> nn.Module:
    guide = seeded(Blocks)
    with torch.no_grad():
        for p in guide.parameters():
            p.fill_(value)
    return guide


def quantised() -> nn.Module:
    guide = seeded(Blocks)
    for p in guide.parameters():
        p.requires_grad_(False)
    for module in guide.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = (module.weight.data * 10).char()
    return guide


def inferred() -> list[torch.Tensor]:
    with torch.inference_mode():
        return [x.clone() for x in vectors()]


def other_plan() -> thesean.Plan:
    return thesean.plan(seeded(Blocks), "narrow", example_inputs=vectors(1)[0])


def planned(**arguments: Any) -> Any:
    return thesean.plan(seeded(Blocks), "narrow", data=vectors(), progress=False, **arguments)


def baseline(**arguments: Any) -> Any:
    return sound(
        thesean.baseline(seeded(Blocks), "narrow", data=vectors(), recipe={"steps": 4}, progress=False, **arguments)
    )


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

INPUTS: Inputs = {**SAME, **DATA, **IDS, **TASK, **PLAN, **AROUND}
