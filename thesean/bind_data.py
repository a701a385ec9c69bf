"""The user's data, loss and metric, read through the guide's signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from thesean import ranks
from thesean.distill.callbacks import checked_loss, checked_metric, length_of, telling
from thesean.distill.data import Feed, make_feed
from thesean.distill.gathered import Gathered
from thesean.distill.guide_cache import GuideCache
from thesean.distill.losses import as_the_guide, warn_of_chance
from thesean.distill.outputs import named_outputs, read_outputs
from thesean.distill.saved_activations import SavedActivations
from thesean.distill.task import Task
from thesean.distill.training import Training
from thesean.journal import KEEPS_NOTHING, Journal
from thesean.observer import Observer
from thesean.passes.capture.captured import Captured, repeats
from thesean.passes.graph.signature import output_wrapper
from thesean.request import Request
from thesean.run_facts import MADE_WITH, run_facts
from thesean.warn import warn

# Batches of one row that are looked at for what outputs are, and numbers of theirs that are held together
_ROWS, _NUMBERS = 32, 2**24


def bind_data(captured: Captured, request: Request, observer: Observer, journal: Journal = KEEPS_NOTHING) -> Training:
    """The user's data and task, read through the guide's signature. Warns where there is no data."""
    feed = make_feed(captured, request.data, request.eval_data, request.example_inputs, request.seed, request.reading)
    wrap = output_wrapper(captured.signature)
    batch, inputs = feed.held_out[0]
    with torch.no_grad():
        first = captured.graph_module(**inputs)
        observed = _observed(captured, [given for _, given in feed.held_out], first, feed.example_labels)
        with telling("loss(output, batch)"):
            loss, metric, asked = as_the_guide(request.loss, request.metric, lambda: wrap(first), batch)
            told = warn_of_chance(loss, lambda: wrap(first), batch)
    if asked is not None:
        feed = replace(feed, notes=(*feed.notes, asked))
    if told is not None:
        feed = replace(feed, warnings=(*feed.warnings, told), notes=(told, *feed.notes))
    feed = replace(feed, notes=(*feed.notes, *told_of(captured)))
    warn(feed.warnings)
    outputs = read_outputs(observed, feed.example_labels, request.outputs)
    task = Task(loss=checked_loss(loss), metric=checked_metric(metric), outputs=outputs, wrap=wrap)
    training = Training(
        guide=captured.graph_module,
        task=task,
        recipe=request.settings,
        feed=feed,
        observer=observer,
        seed=request.seed,
        journal=journal,
        begun=request.begun,
        cache=_cache(captured, request, feed),
    )
    facts = cache(lambda: run_facts(captured, request, feed))
    # a rank's own number, or device, may be among what a loss is made with
    ranks.same(lambda: {name: value for name, value in facts().items() if name != MADE_WITH})
    journal.open(facts, request.resume)
    if ranks.count() == 1:  # else it judges some of these rows
        training.judge.learn(0, first)
    return training


def _cache(captured: Captured, request: Request, feed: Feed) -> GuideCache | None:
    """Of a list all batches come again."""
    if request.cache == "off":
        return None
    saved = None if request.cache == "auto" else SavedActivations(request.cache, captured.graph_module)
    repeats = isinstance(getattr(feed.batches, "data", None), (list, tuple))
    return GuideCache(repeats, saved, length=length_of(request.data))


def _observed(
    captured: Captured, held_out: Sequence[dict[str, torch.Tensor]], first: Any, labels: Sequence[torch.Tensor]
) -> list[Any]:
    """The guide's outputs on the example, or on inputs like it, and on others if there are any. `first` is that on
    the first inputs that are held out. A row of the others is enough where it is known which part of the output it
    makes, and then it may be the next row of the same batch.
    """
    inputs = held_out[0]
    signature, example, gathered = captured.signature, captured.example, Gathered(captured.graph_module)
    by_rows, count = gathered.some_rows(first, 1) is not None, signature.within({"batch": 1})["batch"]

    def row(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return signature.first_rows(given, count) if by_rows else given

    whole, device = example, str(next(iter(example.values())).device)
    if _alike(inputs, example) or (not labels and _alike(row(inputs), row(example))):  # labels have the example's rows
        whole = inputs
    output = first if whole is inputs else captured.graph_module(**whole)
    if signature.check(inputs).get("batch", 1) == 1 and (others := _of_single_rows(captured, held_out[1:])):
        return [output, *others]
    own = row(whole)
    if by_rows and not repeats(signature.first_rows(whole, 2), signature.first_rows(whole, 1)):
        return [output, gathered.some_rows(output, 1, start=1)]
    for other in (example, inputs, signature.random_inputs(signature.check(example), device=device)):
        few = row(other)
        if _alike(few, own) and any(not torch.equal(few[name], value) for name, value in own.items()):
            return [output, captured.graph_module(**few)]
    return [output]


def _of_single_rows(captured: Captured, batches: Sequence[dict[str, torch.Tensor]]) -> list[Any]:
    """What the guide gives on batches of one row: how far apart its outputs are shows in several of them alone."""
    found: list[Any] = []
    numbers = 0
    for inputs in batches[:_ROWS]:
        output = captured.graph_module(**inputs)
        numbers += sum(v.numel() for v in named_outputs(output).values())
        if numbers > _NUMBERS:
            break
        found.append(output)
    return found


def _alike(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(first[name].shape == value.shape for name, value in second.items())


def told_of(captured: Captured) -> tuple[str, ...]:
    """What a person should know of the guide's graph: whoever trains on, that it can't be trained."""
    return (*captured.notes, *((captured.untrainable,) if captured.untrainable else ()))
