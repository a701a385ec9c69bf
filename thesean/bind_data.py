"""The user's data, loss and metric, read through the guide's signature."""

from __future__ import annotations

from dataclasses import replace

import torch

from thesean import ranks
from thesean.distill.callbacks import checked_loss, checked_metric, telling
from thesean.distill.data import different, make_feed
from thesean.distill.losses import warn_of_chance
from thesean.distill.outputs import read_outputs
from thesean.distill.task import Task
from thesean.distill.training import Training
from thesean.journal import KEEPS_NOTHING, Journal
from thesean.observer import Observer
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.signature import output_wrapper
from thesean.request import Request
from thesean.run_facts import run_facts
from thesean.warn import warn


def bind_data(captured: Captured, request: Request, observer: Observer, journal: Journal = KEEPS_NOTHING) -> Training:
    """The user's data and task, read through the guide's signature. Warns where there is no data."""
    feed = make_feed(captured, request.data, request.eval_data, request.example_inputs, request.seed, request.reading)
    wrap = output_wrapper(captured.signature)
    batch, inputs = feed.held_out[0]
    with torch.no_grad():
        first = captured.graph_module(**inputs)
        observed = [first if x is inputs else captured.graph_module(**x) for x in different(captured, inputs)]
        with telling("loss(output, batch)"):
            told = warn_of_chance(request.loss, lambda: wrap(first), batch)
    if told is not None:
        feed = replace(feed, warnings=(*feed.warnings, told), notes=(told, *feed.notes))
    feed = replace(feed, notes=(*feed.notes, *told_of(captured)))
    warn(feed.warnings)
    outputs = read_outputs(observed, feed.example_labels, request.outputs)
    task = Task(loss=checked_loss(request.loss), metric=checked_metric(request.metric), outputs=outputs, wrap=wrap)
    training = Training(
        guide=captured.graph_module,
        task=task,
        recipe=request.settings,
        feed=feed,
        observer=observer,
        seed=request.seed,
        journal=journal,
        begun=request.begun,
    )
    ranks.same(lambda: run_facts(captured, request, feed))
    journal.open(lambda: run_facts(captured, request, feed), request.resume)
    if ranks.count() == 1:  # else it judges some of these rows
        training.judge.learn(0, first)
    return training


def told_of(captured: Captured) -> tuple[str, ...]:
    """What a person should know of the guide's graph: whoever trains on, that it can't be trained."""
    return (*captured.notes, *((captured.untrainable,) if captured.untrainable else ()))
