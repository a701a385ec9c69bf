"""Labels, and the loss that transformers' own models have of them.

B batch, T time, C classes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from thesean.errors import DataError

IGNORED = -100  # of transformers: a label that nothing is asked of


def loss_of(logits: torch.Tensor | None, labels: Any, problem: str | None, floats: str = "regression") -> torch.Tensor:
    """Cross entropy of whole numbers, -100 left out; for "regression" the mean squared error, for
    "multi_label_classification" binary cross entropy. `problem` says which, or labels do, and `floats` is what several
    floats a row are. Raises DataError.
    """
    if logits is None:
        raise DataError("labels: the network has no output 'logits' to compare them with. Compute the loss outside.")
    labels = checked(labels)
    classes = logits.shape[-1]
    if problem is None and labels.is_floating_point():
        problem = "regression" if classes == 1 else floats
    graded = problem in ("multi_label_classification", "regression")
    wanted = logits.shape if graded else logits.shape[:-1]
    single = graded and classes == 1 and labels.shape == logits.shape[:-1]
    if labels.shape != wanted and not single:
        kind = "numbers" if graded else "classes"
        raise DataError(
            f"labels: expected {kind} of shape {tuple(wanted)}, found shape {tuple(labels.shape)}; logits have "
            f"{tuple(logits.shape)}."
        )
    if graded:
        many = problem == "multi_label_classification"
        by = functional.binary_cross_entropy_with_logits if many else functional.mse_loss
        return by(logits.float().reshape(labels.shape), labels.float())
    labels = labels.to(torch.int64)
    with telling(labels, classes):
        return functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def checked(labels: Any) -> torch.Tensor:
    """Labels as floats or as int64. Raises DataError for what is no tensor."""
    if not isinstance(labels, torch.Tensor):
        raise DataError(f"labels: expected a tensor, found {type(labels).__name__}.")
    return labels if labels.is_floating_point() else labels.to(torch.int64)


def check_steps(labels: Any, logits_BTC: torch.Tensor) -> torch.Tensor:
    """Labels of a language model, one a token. Raises DataError."""
    labels_BT = checked(labels)
    if labels_BT.is_floating_point() or labels_BT.shape != logits_BTC.shape[:-1]:
        raise DataError(
            f"labels: expected tokens of shape {tuple(logits_BTC.shape[:-1])}, as input_ids, found "
            f"{labels_BT.dtype} of shape {tuple(labels_BT.shape)}."
        )
    return labels_BT


@contextmanager
def telling(labels: torch.Tensor, classes: int) -> Iterator[None]:
    """DataError for classes that there are not, where a loss fails by them: to look first would wait for a device."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if not wrong.numel():
            raise
        raise DataError(
            f"labels hold {int(wrong[0])}; expected 0 to {classes - 1}, or {IGNORED} where nothing is asked."
        ) from error
