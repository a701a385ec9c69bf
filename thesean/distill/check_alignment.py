"""What a recipe's alignment asks for, against the parts and the batches that there are, before anything is solved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from thesean.distill.task import Batch
from thesean.distill.training import Training
from thesean.errors import DataError
from thesean.passes.graph.nodes import named_dim
from thesean.passes.plan.hybrid import Hybrid
from thesean.passes.plan.partition import matches, no_match
from thesean.recipe import Alignment, RecipeError
from thesean.similarity import get_measure


def check_names(settings: Alignment, paths: Sequence[str]) -> None:
    """Raises RecipeError for a weight or a stage's measure that is of no part, replaced or kept."""
    for name in ("weights", "stage_measures"):
        for glob in getattr(settings, name):
            if isinstance(glob, str) and not any(matches(path, glob) for path in paths):
                raise RecipeError(f"alignment.{name}: {no_match(glob, paths)}")


def check_places(settings: Alignment, stages: int) -> None:
    """Raises RecipeError for the measure of a stage that never comes."""
    places = [place for place in settings.stage_measures if isinstance(place, int)]
    if places and max(places) > stages:
        told = f"1 to {stages}, for the plan replaces {stages} parts" if stages > 1 else "1 alone: one part is replaced"
        raise RecipeError(f"alignment.stage_measures: expected stages {told}, found {max(places)}.")


def check_samples(training: Training, hybrid: Hybrid, batches: Iterable[Batch]) -> None:
    """Raises DataError, with the part, where its activations have no such samples as are to be compared, or `batches`
    or those held out too few of them.
    """
    settings, symbols = training.recipe.alignment, training.guide.meta["symbols"]
    if settings.schedule == "stochastic":  # which compares none
        return
    values = {node.name: node.meta.get("val") for node in training.guide.graph.nodes}
    rows = min(max(training.gathered.rows(own) for _, own in some) for some in (batches, training.feed.held_out))
    for part, (_, exit_) in zip(hybrid.parts, hybrid.boundaries, strict=True):
        value = values[exit_]
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            continue
        sizes = [named_dim(size, symbols) for size in value.shape]
        if settings.normalize_rows and _width(settings, sizes) == 1:
            raise DataError(
                f"{part}: alignment.normalize_rows: its activations are single numbers, of which that leaves the sign "
                "alone. Leave it out."
            )
        if settings.samples == "examples" and sizes[0] != "batch" and not isinstance(sizes[0], int):
            raise DataError(
                f"{part}: alignment.samples: expected activations with a row for each example, found "
                f"({', '.join(map(str, sizes))}). Use samples: tokens."
            )
        if len(sizes) != 3 or settings.samples == "examples":  # else steps are compared
            _check_number(settings, part, sizes[0] if isinstance(sizes[0], int) else rows, len(sizes) == 3)


def _width(settings: Alignment, sizes: Sequence[int | str]) -> int | None:
    """Of a sample, where none of its sizes is free."""
    kept = list(sizes[2 if settings.samples == "tokens" and len(sizes) == 3 else 1 :])
    whole = [size for size in kept if isinstance(size, int)]
    return math.prod(whole) if len(whole) == len(kept) else None


def _check_number(settings: Alignment, part: str, found: int, steps: bool) -> None:
    for name in settings.all_measures:
        if found < (least := get_measure(name).min_examples):
            instead = ", or use samples: tokens" if steps else ""
            raise DataError(
                f"{part}: alignment.samples: {name!r} compares at least {least} examples, and the largest batch has "
                f"{found}. Give larger batches, to train on and held out{instead}."
            )
