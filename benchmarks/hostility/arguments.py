"""Arguments of `compile`, `plan`, `baseline` and `compare` that a hurried or a malicious caller gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.hostility.around import AROUND
from benchmarks.hostility.data import DATA, IDS
from benchmarks.hostility.guides import (
    WIDTH,
    Blocks,
    Words,
    compiled,
    ids,
    refused,
    said,
    seeded,
    sound,
    vectors,
)
from benchmarks.hostility.trial import Inputs, check, only_typed


def built(build: Any) -> thesean.Target:
    """A target that is a function of the caller's."""
    return thesean.Target("mine", build=build)


def square(output: Any, batch: Any) -> torch.Tensor:
    return output.square().mean()


def kept(folder: Path) -> None:
    """The guide itself, to the bit, and untrained."""
    guide, x = seeded(Blocks), vectors()[0]
    found = compiled(guide, "keep")
    check(torch.equal(found(x), guide.eval()(x)), "not the guide that was kept")
    check(found.report.steps == 0, "a guide that was kept was trained")


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
    "target keeps all": kept,
    "target keeps all by a glob": refused({"*": "keep"}),
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


def other_plan() -> thesean.Plan:
    return thesean.plan(seeded(Blocks), "narrow", example_inputs=vectors(1)[0])


def planned(**arguments: Any) -> Any:
    return thesean.plan(seeded(Blocks), "narrow", data=vectors(), progress=False, **arguments)


def baseline(**arguments: Any) -> Any:
    return sound(
        thesean.baseline(seeded(Blocks), "narrow", data=vectors(), recipe={"steps": 4}, progress=False, **arguments)
    )


INPUTS: Inputs = {**SAME, **DATA, **IDS, **TASK, **PLAN, **AROUND}
