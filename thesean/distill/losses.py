"""Losses and metrics for the usual tasks, in the form that `thesean.compile` takes: f(output, batch).

B batch, T time, V vocabulary or classes
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from thesean.distill.data import LABELS
from thesean.distill.task import primary
from thesean.errors import DataError


def cross_entropy(output: Any, batch: Any) -> torch.Tensor:
    """Mean cross-entropy of logits (..., V) against the batch's integer labels: y of (x, y), or `labels` of a dict.

    For language models give the next tokens as y. Labels of -100 are ignored. Raises DataError without labels.
    """
    logits = primary(output)
    labels = _labels(batch)
    if labels.shape != logits.shape[:-1]:
        raise DataError(f"labels of shape {tuple(labels.shape)} don't fit logits of {tuple(logits.shape)}.")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def next_token(output: Any, batch: Any) -> torch.Tensor:
    """Mean cross-entropy of logits_BTV at t against the batch's own `input_ids` at t + 1."""
    logits_BTV = primary(output)
    ids_BT = batch["input_ids"] if hasattr(batch, "keys") else batch[0] if isinstance(batch, (tuple, list)) else batch
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def accuracy(output: Any, batch: Any) -> float:
    """Share of labels that have the largest logit."""
    return (primary(output).argmax(-1) == _labels(batch)).float().mean().item()


def _labels(batch: Any) -> torch.Tensor:
    if hasattr(batch, "keys"):
        found = [batch[k] for k in LABELS if k in batch]
    else:
        found = list(batch[1:]) if isinstance(batch, (tuple, list)) else []
    if not found or not isinstance(found[0], torch.Tensor):
        raise DataError("the batch has no labels: expected (x, y), or a dict with 'labels'.")
    return found[0]
