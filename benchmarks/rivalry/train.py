"""How rivals are trained: the same optimizer, steps and batches for all, a loss and a network each.

B batch, T time, D width, N tokens
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rivalry.blocks import keep_blocks, seeing, with_blocks
from benchmarks.rivalry.students import Student
from benchmarks.rivalry.subjects import Batches, Subject
from thesean.distill.train import cosine

WARMUP = 20

Objective = Callable[[Subject, Student, Any, float], torch.Tensor]  # at a batch, and the share of the steps taken


def outputs(subject: Subject, student: Student, batch: Any, _: float) -> torch.Tensor:
    """The guide's outputs alone (Hinton et al. 2015, 1503.02531)."""
    with torch.no_grad():
        wanted = subject.output(subject.guide, batch)
    return subject.distance(subject.output(student.model, batch), wanted, batch)


def outputs_and_last_state(subject: Subject, student: Student, batch: Any, _: float) -> torch.Tensor:
    """And the direction of the last hidden states (Sanh et al. 2019, 1910.01108)."""
    with torch.no_grad(), _ends(subject, subject.guide, [-1]) as theirs:
        wanted = subject.output(subject.guide, batch)
    with _ends(subject, student.model, [-1]) as own:
        made = subject.output(student.model, batch)
    apart = 1 - F.cosine_similarity(subject.seen(own[0], batch), subject.seen(theirs[0], batch), dim=-1).mean()
    return subject.distance(made, wanted, batch) + apart


def outputs_and_states(subject: Subject, student: Student, batch: Any, _: float) -> torch.Tensor:
    """And the squared error of all hidden states (Muralidharan et al. 2024, 2407.14679: logits and intermediate)."""
    hints, made, wanted = _hints(subject, student, batch)
    return subject.distance(made, wanted, batch) + hints


def hints_then_outputs(subject: Subject, student: Student, batch: Any, done: float) -> torch.Tensor:
    """Hidden states first, outputs then, half of the steps each (Romero et al. 2015, FitNets, 1412.6550)."""
    if done >= 0.5:
        return outputs(subject, student, batch, done)
    return _hints(subject, student, batch)[0]


def _hints(subject: Subject, student: Student, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean over blocks of the states' squared error, in units of the guide's variance; and both outputs."""
    with torch.no_grad(), _ends(subject, subject.guide, student.ends) as theirs:
        wanted = subject.output(subject.guide, batch)
    with _ends(subject, student.model, range(len(student.ends))) as own:
        made = subject.output(student.model, batch)
    lost = []
    for k in range(len(student.ends)):
        x_ND, y_ND = subject.seen(own[k], batch), subject.seen(theirs[k], batch)
        lost.append((x_ND - y_ND).square().sum() / (y_ND - y_ND.mean(0)).square().sum())
    return torch.stack(lost).mean(), made, wanted


def _ends(subject: Subject, model: Any, which: Any) -> Any:
    blocks = subject.layout.blocks(model)
    return seeing([blocks[k] for k in which])


def _batches(data: Batches) -> Iterator[Any]:
    while True:
        yield from data


def train(
    subject: Subject, student: Student, objective: Objective, data: Batches, rate: float, seed: int
) -> tuple[Student, float]:
    """A trained copy, in its last state, and the CPU seconds of it."""
    student = Student(copy.deepcopy(student.model), student.ends)
    return student, _run(subject, student, student.model, objective, data, rate, seed)


def _run(
    subject: Subject, student: Student, trained: nn.Module, objective: Objective, data: Batches, rate: float, seed: int
) -> float:
    torch.manual_seed(seed)
    start, steps = time.process_time(), subject.steps
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    for step, batch in zip(range(steps), _batches(data), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps, WARMUP)
        optimizer.zero_grad()
        objective(subject, student, batch, step / steps).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return time.process_time() - start


class _Swapped(nn.Module):
    """A group of the guide's blocks or its successor, drawn at each call."""

    def __init__(self, theirs: list[nn.Module], own: nn.Module) -> None:
        super().__init__()
        self.theirs, self.own, self.chance = nn.ModuleList(theirs), own, 1.0

    def forward(self, x_BTD: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        for block in [self.own] if torch.rand(()) < self.chance else self.theirs:
            x_BTD = block(x_BTD, *arguments, **named)
        return x_BTD


def groups(blocks: int, count: int) -> list[list[int]]:
    """Neighbours, in `count` groups of nearly equal size."""
    return [chunk.tolist() for chunk in torch.arange(blocks).tensor_split(count)]


def first_of_groups(subject: Subject, _: Batches, count: int) -> Student:
    """What modules are swapped in: the first block of each group, with its weights."""
    found = groups(len(subject.layout.blocks(subject.guide)), count)
    return Student(keep_blocks(subject.guide, subject.layout, [g[0] for g in found]), tuple(g[-1] for g in found))


def swap(
    subject: Subject, student: Student, _: Objective, data: Batches, rate: float, seed: int
) -> tuple[Student, float]:
    """BERT-of-Theseus (Xu et al. 2020, 2002.02925): successors are swapped in with a probability that rises from .3 to
    1 at four fifths of the steps, and train alone, on the task where there are labels (the guide's outputs elsewhere).
    """
    layout = subject.layout
    student = Student(copy.deepcopy(student.model), student.ends)
    theirs = copy.deepcopy(subject.guide).requires_grad_(False)
    found = groups(len(layout.blocks(theirs)), len(student.ends))
    held = list(layout.blocks(theirs))
    swapped = [_Swapped([held[k] for k in g], b) for g, b in zip(found, layout.blocks(student.model), strict=True)]
    whole = Student(with_blocks(theirs, layout, swapped), student.ends)

    def objective(subject: Subject, whole: Student, batch: Any, done: float) -> torch.Tensor:
        for module in swapped:
            module.chance = 0.3 + 0.7 * min(1.0, done / 0.8)
        with torch.no_grad():
            wanted = subject.output(subject.guide, batch)
        made = subject.output(whole.model, batch)
        lost = subject.task(made, wanted, batch)
        return lost if lost.requires_grad else lost + 0 * sum(p.sum() for p in whole.model.parameters())

    seconds = _run(subject, whole, whole.model, objective, data, rate, seed)
    return student, seconds
