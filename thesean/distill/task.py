"""What the user asked for: loss, metric, and how outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thesean.distill.outputs import Outputs
from thesean.errors import DataError

Batch = tuple[Any, dict[str, torch.Tensor]]
Loss = Callable[[Any, Any], torch.Tensor]
Metric = Callable[[Any, Any], float]
InputsOf = Callable[[Any], Any]
LabelsOf = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the user asked for: `loss(output, batch)`, `metric(output, batch)`, and how outputs are compared.

    `wrap` turns the graph's output into what the guide would have returned.
    """

    loss: Loss | None
    metric: Metric | None
    outputs: Outputs
    wrap: Callable[[Any], Any]


def primary(output: Any) -> torch.Tensor:
    """The first floating-point tensor of an output; "logits" where the guide calls one so."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        return output["logits"]
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim:
            return leaf
    raise DataError("the guide's output holds no floating-point tensor; there is nothing to match.")


_ALIKE = 1e-4  # of itself: sums in another order differ by less


def try_loss(task: Task, output: Any, batch: Any, trains: bool, inputs: Mapping[str, Any] | None = None) -> str | None:
    """Before anything is solved: raises DataError for what is no loss, or where it `trains` has no gradient, or for one
    that changes what the guide reads, its `inputs`, or its labels again each time; and says what to tell of one that
    isn't the same each time.
    """

    def leaf(value: torch.Tensor) -> torch.Tensor:
        value = value.clone() if value.is_inference() else value.detach()
        return value.requires_grad_() if value.is_floating_point() else value

    assert task.loss is not None
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            states, values = [_held(batch)], []
            read = [
                next((n for n, x in (inputs or {}).items() if isinstance(x, torch.Tensor) and _same(x, held)), "")
                for held in states[0]
            ]
            for _ in range(2):
                values.append(float(task.loss(task.wrap(output), batch)))
                states.append(_held(batch))
            first, second = values
        _check_unwritten(states, read)
        if trains:
            with torch.enable_grad():
                task_loss(task, pytree.tree_map_only(torch.Tensor, leaf, output), batch)
    if not abs(first - second) > _ALIKE * abs(first):
        return None
    return (
        f"loss(output, batch) gave {first:.4g} and {second:.4g} for the same output: what is kept is what it is lowest "
        "for, and so is by chance. Draw nothing in it, or the same each time."
    )


def _held(batch: Any) -> list[torch.Tensor]:
    """Copies of a batch's tensors."""
    leaves = [v for v in pytree.tree_leaves(batch) if isinstance(v, torch.Tensor) and v.layout == torch.strided]
    return [v.detach().clone() for v in leaves]


def _check_unwritten(states: Sequence[Sequence[torch.Tensor]], read: Sequence[str]) -> None:
    """`states` of a batch's tensors: as it came, and after each time that the loss had it; `read`: which input of the
    guide each is, "" for what is none.
    """
    if len({len(state) for state in states}) > 1:  # it was given more to hold
        return
    for name, before, once, twice in zip(read, *states, strict=True):
        if name and not _same(before, once):
            found = f"{name} of its batch, which the guide reads"
        elif not _same(once, twice):
            found = "its batch, and once more each time that this comes"
        else:
            continue
        raise DataError(
            f"loss(output, batch) changes {found}, so that later passes compute something else. Let it make its own: "
            "labels = batch[...].clone() first."
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def task_loss(task: Task, output: Any, batch: Any) -> torch.Tensor:
    """The user's loss of a graph's output; raises DataError unless it is a scalar that a gradient can flow from."""
    assert task.loss is not None
    value = task.loss(task.wrap(output), batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(
            f"loss(output, batch) returned {found}; expected a scalar tensor computed from output. "
            "Return a mean, and not .item() of it."
        )
    return value
