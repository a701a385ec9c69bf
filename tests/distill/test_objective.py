"""What a stage minimises: measures and their sums, weights of parts, and what the whole network puts out.

N examples, P features
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.distill.test_gate import Cells, windows
from tests.distill.tools import batches_of, drafted, recipe, task, training
from tests.models import vectors
from thesean.distill.align import Aligner, Stage, stages
from thesean.distill.check_alignment import check_samples
from thesean.distill.objective import Objective, measures_of_stage, told_of_batches
from thesean.errors import DataError, UnknownNameError
from thesean.recipe import Alignment, Recipe, RecipeError
from thesean.similarity import get_measure

OWN_NP, GUIDE_NP = vectors(9, 4, seed=1), vectors(9, 4, seed=2)


def settings(schedule: str = "progressive", **alignment: Any) -> Recipe:
    made = recipe(8, schedule, share=1.0)
    given = {**made.model_dump(), "alignment": {**made.alignment.model_dump(), **alignment}}
    return Recipe.model_validate(given)


def objective(what: Any = None, **alignment: Any) -> Objective:
    told = training(captured.mlp(), what or task(output="softmax"), settings(**alignment))
    return Objective(told, ["0..1", "2..3", "4..5"])


def loss_of(measure: str) -> float:
    return get_measure(measure).loss(OWN_NP, GUIDE_NP).item()


def test_one_measure_is_itself():
    assert objective(measure="cka").at_exit(0, OWN_NP, GUIDE_NP).item() == loss_of("cka")
    assert objective(measure="cka").name == "cka"


def test_several_measures_are_summed_by_their_weights():
    both = objective(measure={"nmse": 1.0, "cka": 0.5})
    expected = loss_of("nmse") + 0.5 * loss_of("cka")
    assert both.at_exit(0, OWN_NP, GUIDE_NP).item() == pytest.approx(expected, rel=1e-6)
    assert both.name == "nmse + 0.5 cka"


def test_samples_are_tokens_or_whole_examples():
    own_BTD, guide_BTD = vectors(6, 5, 4, seed=1), vectors(6, 5, 4, seed=2)
    for samples, flat in (("tokens", (0, 1)), ("examples", (1, 2))):
        found = objective(measure="cka", samples=samples).at_exit(0, own_BTD, guide_BTD).item()
        expected = get_measure("cka").loss(own_BTD.flatten(*flat), guide_BTD.flatten(*flat)).item()
        assert found == pytest.approx(expected, rel=1e-6)


def test_hidden_tokens_are_0_in_whole_examples():
    own_BTD, guide_BTD = vectors(6, 5, 4, seed=1), vectors(6, 5, 4, seed=2)
    mask_BT = torch.arange(5) < torch.tensor([5, 3, 4, 1, 5, 2])[:, None]
    hidden_BTD = ~mask_BT[..., None].expand_as(own_BTD)
    noisy_BTD = own_BTD.masked_fill(hidden_BTD, torch.nan).requires_grad_()
    by_example = objective(measure="cka", samples="examples")
    found = by_example.at_exit(0, noisy_BTD, guide_BTD.masked_fill(hidden_BTD, torch.nan), mask_BT)
    assert found.item() == by_example.at_exit(0, own_BTD * mask_BT[..., None], guide_BTD * mask_BT[..., None]).item()
    (slope_BTD,) = torch.autograd.grad(found, noisy_BTD)
    assert not slope_BTD[hidden_BTD].any()
    assert slope_BTD[~hidden_BTD].abs().min() > 0


def test_normalised_rows_are_compared_whatever_their_length():
    lengths_N1 = torch.linspace(0.1, 9, 9)[:, None]
    for measure in ("cka", "nmse"):
        as_they_are, normalised = (objective(measure=measure, normalize_rows=by) for by in (False, True))
        found = [by.at_exit(0, lengths_N1 * OWN_NP, GUIDE_NP).item() for by in (as_they_are, normalised)]
        expected = [by.at_exit(0, OWN_NP, GUIDE_NP / 7).item() for by in (as_they_are, normalised)]
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
        assert found[0] != pytest.approx(expected[0], rel=1e-2)
    assert loss_of("cka") != pytest.approx(found[1], rel=1e-2)


def test_the_last_glob_that_fits_weighs_a_part():
    weighed = objective(weights={"*": 2.0, "4*": 3.0})
    found = [weighed.at_exit(part, OWN_NP, GUIDE_NP).item() / loss_of("nmse") for part in range(3)]
    assert found == pytest.approx([2, 2, 3], rel=1e-6)


def test_companions_are_the_outputs_divergence_and_the_users_loss():
    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return 7.0 + 0.0 * output.sum()

    what = task(loss, output="softmax")
    both = objective(what, output="reverse-kl", output_weight=0.25, task=0.5)
    own_NV, guide_NV = vectors(6, 5, seed=3).requires_grad_(), vectors(6, 5, seed=4)
    divergence, own = both.at_output(own_NV, guide_NV, {}, None)
    reversed_kl = get_measure("kl").value(guide_NV, own_NV)
    assert divergence.item() == pytest.approx(0.25 * reversed_kl.item(), rel=1e-5)
    assert own.item() == pytest.approx(3.5)
    assert both.name == "nmse + 0.25 output reverse-kl + 0.5 loss"
    assert not objective(what).whole
    assert objective(what, task=0.5).whole
    assert objective(what, output="kl").whole


def test_a_guide_that_hardly_varies_asks_for_nothing_and_it_is_told(caplog):
    own_NP = OWN_NP.clone().requires_grad_()
    for size, asked in ((1e-9, False), (1e-7, True)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            loss = objective(measure="nmse").at_exit(1, own_NP, size * GUIDE_NP)
        (slope_NP,) = torch.autograd.grad(loss, own_NP)
        assert bool(slope_NP.any()) == bool(loss) == asked
        told = [] if asked else ["2..3: the guide's activations hardly vary there, nothing is aligned"]
        assert [record.getMessage() for record in caplog.records] == told


def test_a_batch_with_too_few_examples_counts_for_nothing_once_another_had_enough():
    by_cka = objective(measure="cka")
    few = OWN_NP[:3].clone().requires_grad_()
    with pytest.raises(DataError, match="expected at least 4 examples, found 3"):
        by_cka.at_exit(0, few, GUIDE_NP[:3])
    by_cka.at_exit(0, OWN_NP, GUIDE_NP)
    assert not by_cka.skipped
    nothing = by_cka.at_exit(0, few, GUIDE_NP[:3])
    assert (nothing.item(), by_cka.skipped) == (0.0, True)
    nothing.backward()
    assert few.grad is not None
    assert not few.grad.any()


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_what_a_loader_has_left_at_the_end_ends_no_run(share):
    """A last batch of one row, to train on and held out: of vectors, each of which is an example."""
    rows = [vectors(8, 8, seed=k) for k in range(3)]
    data, held_out = [*rows, rows[0][:1]], [rows[1][:1], rows[2]]
    recipe = {"steps": 12, "alignment": {"share": share, "check_every": 3, "ceiling": 0}}
    converted = thesean.compile(
        models.mlp(), "mlp", data=data, eval_data=held_out, recipe=recipe, progress=False
    )  # fmt: skip
    assert converted.report.steps == 12
    told = "3 parts: batches of fewer than 2 examples were not compared"
    assert (told in converted.report.notes) == (share > 0)


def test_what_can_not_be_compared_is_told_of_its_part():
    with pytest.raises(DataError, match=r"^4\.\.5: nmse: y is constant"):
        objective(measure="nmse").at_exit(2, OWN_NP, torch.ones(9, 4))


def test_measures_that_are_no_means_are_told_of_where_several_batches_make_a_step():
    def told(count: int, schedule: str = "joint", **measures: float) -> list[str]:
        made = settings(schedule, measure=measures)
        return told_of_batches(made.model_copy(update={"gradient_accumulation": count}))

    assert told(4, mse=1.0, cka=0.5) == [
        "cka: of each batch by itself, not of all examples of the 4 batches that make a step"
    ]
    assert told(2, cka=1.0, rsa=1.0)[0].startswith("cka, rsa: of each batch by itself, not of all examples of the 2 ")
    assert told(1, cka=1.0) == told(4, mse=1.0) == told(4, "stochastic", cka=1.0) == []


def test_a_stochastic_stage_has_the_users_loss_or_the_divergence_unless_told_otherwise():
    with_loss = task(lambda output, batch: output.square().mean(), output="softmax")
    for what, name in ((with_loss, "loss"), (task(output="softmax"), "output kl")):
        assert objective(what, schedule="stochastic").name == name
    assert objective(with_loss, schedule="stochastic", output="js", task=0.5).name == "output js + 0.5 loss"


def aligner(**alignment: Any) -> Aligner:
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    told = training(guide, task(lambda o, b: o.square().mean(), output="softmax"), settings(**alignment))
    return Aligner(hybrid, told, [inputs for _, inputs in told.feed.batches])


def test_what_is_held_out_is_judged_by_the_whole_objective():
    alone, more = aligner(), aligner(output="kl", task=2.0)
    judged = more.training.judge(more.hybrid.graph_module)
    assert judged.loss is not None
    expected = alone.held_out_loss(2) + judged.divergence + 2 * judged.loss
    assert more.held_out_loss(2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reads", ["guide", "hybrid", "mixed"])
def test_a_companion_is_added_whatever_parts_read(reads):
    alone, more = aligner(inputs=reads), aligner(inputs=reads, output="kl")
    (stage,) = stages("joint", 3, 4)
    batch = batches_of(captured.mlp(), 1, seed=3)[0]
    found, exits = more._loss(stage)(0, batch), alone._loss(stage)(0, batch)
    judge = training(captured.mlp(), task(output="softmax"), settings(), held_out=[batch]).judge
    more.hybrid.graph_module.eval()
    divergence = judge(more.hybrid.graph_module).divergence
    assert found.item() == pytest.approx(exits.item() + divergence, rel=1e-6)
    assert divergence > 1e-5 * exits.item()


@pytest.mark.parametrize("reads", ["guide", "hybrid", "mixed"])
def test_the_mean_over_parts_leaves_companions_as_they_are(reads):
    (stage,) = stages("joint", 3, 4)
    batch = batches_of(captured.mlp(), 1, seed=3)[0]

    def of(**alignment: Any) -> float:
        return aligner(inputs=reads, **alignment)._loss(stage)(0, batch).item()

    summed, mean = of(), of(reduction="mean")
    assert summed == pytest.approx(3 * mean, rel=1e-6)
    rounded = 4 * torch.finfo(torch.float32).eps * summed  # what the differences may be off
    assert of(output="kl", reduction="mean") - mean == pytest.approx(of(output="kl") - summed, rel=1e-3, abs=rounded)
    assert of(output="kl") - summed > 100 * rounded


def test_a_stage_compares_what_it_is_told_to_whatever_parts_read():
    batch = batches_of(captured.mlp(), 1, seed=3)[0]

    def of(*compared: int) -> float:
        stage = Stage(number=0, count=3, trained=compared, compared=compared, steps=1)
        return aligner(inputs="guide")._loss(stage)(0, batch).item()

    assert of(0, 1) == pytest.approx(of(0) + of(1), rel=1e-6)
    assert of(2) != of(1)


def convert(loss: Any = None, **alignment: Any) -> thesean.Converted:
    whole = {"steps": 24, "warmup": 1, "alignment": {"share": 1.0, "check_every": 4, **alignment}}
    guide = models.seeded(Cells)
    return thesean.compile(guide, "mingru", data=windows(), recipe=whole, progress=False, loss=loss)


@pytest.mark.parametrize("schedule", ["progressive", "sequential"])
def test_a_companion_is_of_the_network_in_which_the_parts_so_far_are_replaced(schedule):
    converted = convert(schedule=schedule, output="kl", measure={"nmse": 1e-9})
    for row in converted.report.stages:  # by next to nothing but the divergence, which the report has beside
        assert row.measure == "1e-09 nmse + output kl"
        assert row.after == pytest.approx(row.divergence, rel=1e-3)
    assert converted.report.stages[0].after <= converted.report.stages[0].before


def test_a_companion_brings_the_output_nearer_than_parts_exits_alone():
    alone, more = convert(schedule="joint"), convert(schedule="joint", output="kl", output_weight=10.0)
    found = [c.report.converted["divergence"] for c in (alone, more)]
    assert found[1] < found[0]


def test_a_stage_may_have_a_loss_of_its_own_by_its_part_or_place():
    settings = Alignment(
        schedule="progressive",
        measure="mse",
        stage_measures={"cells": "cka", 2: {"nmse": 1.0, "cka": 0.5}, "*.2": "nmse"},
    )
    found = [measures_of_stage(settings, f"cells.{k}", k + 1) for k in range(3)]
    assert found == [{"cka": 1.0}, {"nmse": 1.0, "cka": 0.5}, {"nmse": 1.0}]
    assert measures_of_stage(settings, "head", 1) == {"mse": 1.0}
    assert settings.all_measures == ["mse", "cka", "nmse"]


def test_stages_are_aligned_and_reported_by_their_own_losses():
    of_stages = {1: "cka", "cells.0": {"cka": 2.0}}
    converted = convert(schedule="progressive", order="back-to-front", stage_measures=of_stages)
    told = {"cells.2": "cka", "cells.1": "nmse", "cells.0": "2 cka"}  # in the order in which they come
    assert {row.part: row.measure for row in converted.report.stages} == told
    last = converted.report.stages[-1]
    assert 0 < last.after <= last.before <= 2  # twice 1 - CKA


def test_too_few_whole_examples_are_refused_before_anything_is_solved():
    guide = captured.encoder()
    _, hybrid = drafted(guide, "rnn")

    def check(rows: int, held_out: int = 4, **alignment: Any) -> None:
        batches, held = batches_of(guide, 2, batch=rows), batches_of(guide, 2, batch=held_out)
        told = training(guide, task(output="mse"), settings(**alignment), batches=batches, held_out=held)
        check_samples(told, hybrid, batches)

    by_example: dict[str, Any] = {"samples": "examples", "measure": {"nmse": 1.0, "cka": 1.0}}
    check(4, **by_example)
    check(1, measure="cka")
    check(1, schedule="stochastic", **by_example)
    for rows in ((3, 4), (4, 3)):
        with pytest.raises(DataError, match=r"alignment.samples: 'cka' compares at least 4 examples, and .* has 3\."):
            check(*rows, **by_example)


class Flat(nn.Module):
    """x_BTD -> y_BTD by a map of all tokens of a batch at once."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.map(x.flatten(0, 1)).relu().unflatten(0, (x.shape[0], x.shape[1])))


def test_activations_without_a_row_for_each_example_are_refused():
    recipe = {"steps": 4, "alignment": {"share": 1.0, "samples": "examples"}}
    told = r"^map: alignment.samples: expected activations with a row for each example, found \(\w+\*\w+, 8\)"
    with pytest.raises(DataError, match=told):
        thesean.compile(Flat(), "mlp", parts=["map"], data=[vectors(4, 5, 8)], recipe=recipe, progress=False)


def test_rows_of_one_number_are_not_normalised():
    guide = nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 4))
    recipe = {"steps": 4, "alignment": {"share": 1.0, "normalize_rows": True}}
    with pytest.raises(DataError, match=r"^0: alignment.normalize_rows: its activations are single numbers"):
        thesean.compile(guide, "mlp", parts=["0"], data=[vectors(8, 8)], recipe=recipe, progress=False)


@pytest.mark.parametrize(
    ("alignment", "error", "told"),
    [
        ({"schedule": "progressive", "stage_measures": {"cell.1": "cka"}}, RecipeError,
         "^alignment.stage_measures: no part matches 'cell.1'; did you mean"),
        ({"schedule": "progressive", "stage_measures": {4: "cka"}}, RecipeError,
         "^alignment.stage_measures: expected stages 1 to 3, for the plan replaces 3 parts, found 4"),
        ({"schedule": "progressive", "stage_measures": {1: "svcca"}}, RecipeError, "'svcca' has no gradient"),
        ({"task": 0.5}, RecipeError, r"^alignment.task: it is the weight of loss=, and none was given"),
        ({"measure": "nmsee"}, UnknownNameError, "unknown measure 'nmsee'; did you mean 'nmse'"),
        ({"measure": {"nmse": 1, "svcca": 1}}, RecipeError, r"^alignment.measure: 'svcca' has no gradient to train on"),
        ({"weights": {"cell.1": 2.0}}, RecipeError, "^alignment.weights: no part matches 'cell.1'; did you mean"),
    ],
)  # fmt: skip
def test_what_can_not_be_minimised_is_one_line(alignment, error, told):
    with pytest.raises(error, match=told) as caught:
        convert(**alignment)
    assert "\n" not in str(caught.value)
