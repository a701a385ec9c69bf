"""Losses and metrics for the usual tasks, in the form that `thesean.compile` takes: f(output, batch).

Means over rows, so that of several ranks each may give its own rows of an output beside the whole batch: logits needn't
be gathered.

B batch, T time, V vocabulary or classes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from thesean import exchange, ranks
from thesean.distill.data import by_field, labels_in
from thesean.distill.task import primary
from thesean.errors import DataError
from thesean.kernels.shared.precision import wide

_IGNORED = -100  # what torch's cross_entropy leaves out
_PIECE = 2**20  # logits that are looked at together where no gradient is wanted


Of = TypeVar("Of", bound=Callable[..., Any])


def by_rows(function: Of) -> Of:
    """Marks what takes a rank's own rows of an output: see `Gathered.given`."""
    function.by_rows = True  # type: ignore[attr-defined]
    return function


@by_rows
def cross_entropy(output: Any, batch: Any) -> torch.Tensor:
    """Mean cross-entropy of logits (..., V), or (B, V, ...) as torch has them, against the batch's integer labels: y of
    (x, y), or `labels` of a dict.

    Labels of -100 are ignored. Those that are the batch's own ids follow Hugging Face's convention for causal language
    models: position t is asked for label t + 1; `thesean.compile` looks which of the two the guide was trained for.
    Raises DataError without labels that fit.
    """
    return _entropy(output, batch, labels_are_inputs(batch))


@by_rows
def _cross_entropy_here(output: Any, batch: Any) -> torch.Tensor:
    """`cross_entropy` of a model that is asked for its inputs where they stand."""
    return _entropy(output, batch, ahead=False)


def _entropy(output: Any, batch: Any, ahead: bool) -> torch.Tensor:
    logits = primary(output)
    batch, shared = _own_rows(batch, logits.shape[0])
    logits, labels = _asked(logits, batch, ahead)
    return _mean(wide(logits.flatten(0, -2)), labels.flatten(), shared)


def _asked(logits: torch.Tensor, batch: Any, ahead: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and what they are asked for, `ahead`: one step later."""
    if logits.ndim > 2:
        moved, shapes = logits.movedim(1, -1), [y.shape for y in labels_in(batch)]
        if logits.shape[:-1] not in shapes and moved.shape[:-1] in shapes:  # where the classes stand for torch's own
            logits = moved
    labels = _labels(batch, logits.shape[:-1])
    return (logits[:, :-1], labels[:, 1:]) if ahead else (logits, labels)


def labels_are_inputs(batch: Any) -> bool:
    """Whether a batch's labels are its ids, padding aside: a model that is asked for those copies its input. Not where
    a decoder reads them one step late.
    """
    ids_BT, labels = _ids_in(batch), next(iter(labels_in(batch)), None)
    if ids_BT is None or labels is None or labels.shape != ids_BT.shape or ids_BT.ndim != 2 or ids_BT.shape[1] < 2:
        return False
    asked = labels != _IGNORED
    return bool(asked.any()) and bool((labels == ids_BT)[asked].all())


def _ids_in(batch: Any) -> torch.Tensor | None:
    """The whole numbers that a model reads: `input_ids` of a dict, the first of a tuple."""
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids") if "decoder_input_ids" not in batch else None
    return batch if isinstance(batch, torch.Tensor) and not batch.is_floating_point() else None


@by_rows
def next_token(output: Any, batch: Any) -> torch.Tensor:
    """Mean cross-entropy of logits_BTV at t against the batch's own `input_ids` at t + 1.

    Where the batch has an `attention_mask`, only between tokens that it doesn't hide: padding is neither asked for nor
    asked.
    """
    logits_BTV = primary(output)
    batch, shared = _own_rows(batch, logits_BTV.shape[0])
    if isinstance(batch, (tuple, list)) and isinstance(batch[0], Mapping):
        batch = batch[0]
    ids_BT = batch["input_ids"] if hasattr(batch, "keys") else batch[0] if isinstance(batch, (tuple, list)) else batch
    asked_BT = ids_BT[:, 1:]
    mask_BT = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask_BT, torch.Tensor) and mask_BT.shape == ids_BT.shape:
        asked_BT = asked_BT.masked_fill((mask_BT[:, 1:] == 0) | (mask_BT[:, :-1] == 0), _IGNORED)
    return _mean(wide(logits_BTV[:, :-1].flatten(0, 1)), asked_BT.flatten(), shared)


def _own_rows(batch: Any, rows: int) -> tuple[Any, bool]:
    """A batch's rows that an output of so many is of, and whether other ranks have others."""
    if ranks.count() == 1:
        return batch, False
    if isinstance(batch, Mapping):
        batch = dict(batch)
    sizes = [v.shape[0] for v in pytree.tree_leaves(batch) if isinstance(v, torch.Tensor) and v.ndim]
    if not sizes or sizes[0] == rows:
        return batch, False
    own = ranks.own_rows(sizes[0])
    return pytree.tree_map_only(torch.Tensor, lambda v: v[own] if v.shape[:1] == (sizes[0],) else v, batch), True


def _mean(logits_NV: torch.Tensor, labels_N: torch.Tensor, shared: bool) -> torch.Tensor:
    """The cross-entropy over the labels that count; `shared`: of all ranks."""
    if not shared and torch.is_grad_enabled():
        return F.cross_entropy(logits_NV, labels_N)
    count = (labels_N != _IGNORED).sum().to(logits_NV.dtype)
    return exchange.total(_sum(logits_NV, labels_N)) / exchange.total(count)


def _sum(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Of the cross-entropy; without gradients some rows at a time, for its logarithms take as much as the logits."""
    rows = len(labels_N) if torch.is_grad_enabled() else max(1, _PIECE // logits_NV.shape[1])
    pieces = zip(logits_NV.split(rows), labels_N.split(rows), strict=True)
    return torch.stack([F.cross_entropy(x_NV, y_N, reduction="sum") for x_NV, y_N in pieces]).sum()


def as_the_guide(
    loss: Any, metric: Any, run: Callable[[], Any], batch: Any
) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None, str | None]:
    """Loss and metric for the guide whose output `run` gives, and what to tell: where labels are the inputs, whether
    they are asked one step ahead or where they stand is whichever the guide is better at.
    """
    if not (loss is cross_entropy or metric is accuracy) or not labels_are_inputs(batch):
        return loss, metric, None
    output = run()
    ahead, here = (_entropy(output, batch, step).item() for step in (True, False))
    told = "labels are the inputs, asked {} (the guide's loss is {:.2f} nats so, {:.2f} {})"
    if not here < ahead:
        return loss, metric, told.format("one step ahead", ahead, here, "where they stand")
    loss = _cross_entropy_here if loss is cross_entropy else loss
    metric = _accuracy_here if metric is accuracy else metric
    return loss, metric, told.format("where they stand", here, ahead, "one step ahead")


_NO_BETTER = 0.99  # of a uniform guess's loss: an untrained network is within a few thousandths of it


def warn_of_chance(loss: Any, run: Callable[[], Any], batch: Any) -> str | None:
    """What to tell, before anything trains, of a guide that only guesses, whose output `run` gives.
    None of one that does, and for losses of the caller's own.
    """
    if loss not in (cross_entropy, _cross_entropy_here, next_token):
        return None
    output = run()
    classes = primary(output).shape[-1]
    value, chance = loss(output, batch).item(), math.log(classes)
    if classes < 2 or not value >= _NO_BETTER * chance:
        return None
    return (
        f"the guide's loss is {value:.2f} nats on a held-out batch, no better than a uniform guess over {classes} "
        f"classes ({chance:.2f}): the labels may not be what it was trained on, or its weights not the trained ones."
    )


@by_rows
def accuracy(output: Any, batch: Any) -> float:
    """Share of labels that have the largest logit; those of -100 are left out."""
    return _share(output, batch, labels_are_inputs(batch))


@by_rows
def _accuracy_here(output: Any, batch: Any) -> float:
    """`accuracy` of a model that is asked for its inputs where they stand."""
    return _share(output, batch, ahead=False)


def _share(output: Any, batch: Any, ahead: bool) -> float:
    logits = primary(output)
    batch, shared = _own_rows(batch, logits.shape[0])
    logits, labels = _asked(logits, batch, ahead)
    asked = labels != _IGNORED
    right = (logits.argmax(-1) == labels)[asked].float()
    if shared:
        return (exchange.total(right.sum()) / exchange.total(asked.sum())).item()
    return right.mean().item()


def _labels(batch: Any, shape: torch.Size) -> torch.Tensor:
    """The labels of this shape, or, of a tuple with several tensors, the last that has it and whole numbers."""
    found = labels_in(batch)
    if not found:
        fields = by_field(batch, getattr(batch, "_fields", ()))
        keys = f", found {', '.join(map(repr, fields))}" if isinstance(fields, Mapping) else ""
        raise DataError(
            f"the batch has no labels: expected (x, y), or a dict with 'labels'{keys}. Say where they are: "
            "labels=lambda batch: ..."
        )
    fitting = [y for y in found if y.shape == shape]
    if not fitting:
        sizes = ", ".join(map(str, (*shape, "classes")))
        raise DataError(f"labels of shape {tuple(found[0].shape)} don't fit logits of ({sizes}).")
    return next((y for y in fitting if not y.is_floating_point()), fitting[0])
