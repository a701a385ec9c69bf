from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import captured, models
from tests.distill.tools import Recorder, batches_of, recipe, task, training
from thesean.distill.gathered import Gathered
from thesean.distill.snapshot import with_state
from thesean.distill.stages import Conversion, align, tune
from thesean.distill.training import Training
from thesean.errors import NumericalError
from thesean.passes.capture.capture import capture
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.recipe import Recipe


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def run(guide, target="mlp", settings=None, seed=0, what=None, observer=None, **division) -> Conversion:
    told = training(guide, what or task(cross_entropy, output="softmax"), settings or recipe(8), observer=observer)
    return converted(make_plan(guide, target, **division), told, seed)


def converted(bound_plan: BoundPlan, told: Training, seed: int = 0) -> Conversion:
    torch.manual_seed(seed)
    hybrid = build_hybrid(bound_plan)
    return tune(told, align(bound_plan, hybrid, told))


@pytest.mark.thorough
@pytest.mark.parametrize("schedule", ["progressive", "sequential", "independent", "joint", "none"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(schedule):
    first, second, other = (run(captured.mlp(), settings=recipe(8, schedule), seed=s) for s in (0, 0, 1))
    state = first.hybrid.graph_module.state_dict()
    assert models.same_state(second.hybrid.graph_module, state)
    assert not models.same_state(other.hybrid.graph_module, state)


@pytest.mark.parametrize("schedule", ["progressive", "sequential", "independent", "joint", "none"])
def test_each_part_leaves_a_snapshot_and_each_step_is_counted(schedule):
    guide = captured.mlp()
    conversion = run(guide, settings=recipe(8, schedule))
    assert [s.count for s in conversion.snapshots] == [1, 2, 3]
    assert conversion.steps == 8
    assert all(s.evaluation.divergence >= 0 for s in conversion.snapshots)
    assert conversion.guide.divergence == 0


def test_every_hybrid_on_the_way_is_usable():
    guide = captured.gpt2()
    bound_plan = make_plan(guide, "gru")
    conversion = run(guide, "gru", what=task(logits="softmax"), settings=recipe(4))
    (_, inputs), *_ = batches_of(guide, 1, 2)
    for snapshot in conversion.snapshots:
        hybrid = with_state(bound_plan, snapshot.count, snapshot.state)
        assert len(hybrid.parts) == snapshot.count
        assert hybrid.graph_module(**inputs)["logits"].isfinite().all()


def test_snapshots_are_untouched_by_later_training():
    guide = captured.mlp()
    bound_plan = make_plan(guide, "mlp")
    conversion = run(guide, settings=recipe(10, learning_rate=0.01))
    assert conversion.steps == 10
    alone = run(guide, settings=recipe(10, learning_rate=0.01, share=0.5).model_copy(
        update={"fine_tuning": recipe().fine_tuning.model_copy(update={"share": 0})}
    ))  # fmt: skip
    for tuned, untuned in zip(conversion.snapshots, alone.snapshots, strict=True):
        assert tuned.state.keys() == untuned.state.keys()
        for name, state in tuned.state.items():
            assert all(torch.equal(v, untuned.state[name][k]) for k, v in state.items())
    last = with_state(bound_plan, 3, conversion.snapshots[-1].state)
    assert not models.same_state(conversion.hybrid.graph_module, models.state_of(last.graph_module))


def test_a_snapshot_of_k_parts_holds_k_parts_and_the_guide_elsewhere():
    guide = captured.mlp()
    bound_plan = make_plan(guide, "mlp")
    conversion = run(guide)
    hybrid = with_state(bound_plan, 1, conversion.snapshots[0].state)
    theirs = dict(guide.graph_module.named_parameters())
    kept = {k: v for k, v in hybrid.graph_module.named_parameters() if not k.startswith("part_")}
    assert set(kept) == {k for k in theirs if not k.startswith("0.")}
    assert all(torch.equal(v, theirs[k]) for k, v in kept.items())


def test_the_guide_stays_bit_for_bit():
    guide = captured.mlp()
    before = models.state_of(guide.graph_module)
    run(guide)
    assert models.same_state(guide.graph_module, before)
    assert all(p.requires_grad for p in guide.graph_module.parameters())


def test_closed_form_alone_takes_no_step():
    observer = Recorder()
    conversion = run(captured.mlp(), settings=Recipe.named("fast"), observer=observer)
    assert conversion.steps == 0
    assert observer.losses == []
    assert [p[0] for p in observer.phases] == ["solve"] * 3
    assert [s.result for s in conversion.snapshots] == [None] * 3
    fast = Recipe.named("fast")
    without = fast.model_copy(update={"closed_form": fast.closed_form.model_copy(update={"enabled": False})})
    run(captured.mlp(), settings=without, observer=observer)
    assert [p[0] for p in observer.phases[3:]] == ["judge"] * 3  # nothing is solved


def test_the_papers_recipe_aligns_by_cka_and_then_trains_on_the_task():
    observer = Recorder()
    paper = Recipe.named("paper").model_copy(update={"steps": 8})
    conversion = run(captured.mlp(), settings=paper, observer=observer)
    assert [p[0] for p in observer.phases] == ["align"] * 3 + ["fine-tune"]
    assert conversion.steps == 8
    assert all(s.result is not None for s in conversion.snapshots)


def test_steps_that_alignment_did_not_use_go_to_fine_tuning():
    observer = Recorder()
    settings = recipe(20, share=0.5)
    easy = settings.model_copy(update={"alignment": settings.alignment.model_copy(update={"ceiling": 10.0})})
    conversion = run(captured.mlp(), settings=easy, observer=observer)
    assert observer.phases[-1] == ("fine-tune", None, 1, 1, 20)
    assert conversion.steps == 20


def test_the_converted_network_is_in_eval_mode_and_trainable():
    graph_module = run(captured.mlp()).hybrid.graph_module
    assert not graph_module.training
    assert all(p.requires_grad for p in graph_module.parameters())


def test_an_untrained_conversion_is_beaten():
    guide = captured.mlp()
    settings = recipe(60, "independent", share=0.2, learning_rate=5e-3)
    before = run(guide, settings=recipe(0, "none").model_copy(update={
        "closed_form": Recipe().closed_form.model_copy(update={"enabled": False}),
    }), what=task(output="softmax"))  # fmt: skip
    after = run(guide, settings=settings, what=task(output="softmax"))
    assert after.final.divergence < 0.5 * before.final.divergence


def test_metric_and_loss_are_the_users():
    def metric(output, batch):
        return 0.25

    conversion = run(captured.mlp(), what=task(cross_entropy, metric, output="softmax"))
    assert conversion.final.metric == pytest.approx(0.25)
    assert conversion.guide.loss is not None
    assert run(captured.mlp(), what=task(output="softmax")).final.loss is None


def test_a_guide_that_gives_no_numbers_is_found_before_anything_trains():
    guide = captured.mlp()
    batches = batches_of(guide)
    broken = [(batch, {k: v * float("nan") for k, v in inputs.items()}) for batch, inputs in batches]
    with pytest.raises(NumericalError, match="held-out batch 0: the guide's own output"):
        converted(make_plan(guide, "mlp"), training(guide, task(output="softmax"), recipe(4), held_out=broken))


def test_the_last_stages_figures_are_the_conversions_own_where_nothing_follows():
    guide = captured.gpt2()
    told = training(guide, task(logits="softmax"), Recipe.named("fast"))
    conversion = converted(make_plan(guide, "rnn"), told)
    assert conversion.final is conversion.snapshots[-1].evaluation
    again = training(guide, task(logits="softmax"), Recipe.named("fast")).judge(conversion.hybrid.graph_module)
    assert conversion.final.divergence == pytest.approx(again.divergence, rel=1e-6)
    assert conversion.notes == ()


@pytest.mark.parametrize("schedule", ["none", pytest.param("progressive", marks=pytest.mark.thorough)])
def test_each_stage_is_told_the_divergence_of_the_hybrid_that_it_left(schedule):
    guide = captured.gpt2(3)
    bound_plan = make_plan(guide, "rnn")
    told = training(guide, task(logits="softmax"), recipe(6, schedule, share=0.5 if schedule != "none" else 0))
    for snapshot in converted(bound_plan, told).snapshots:
        built = with_state(bound_plan, snapshot.count, snapshot.state)
        assert snapshot.evaluation.divergence == pytest.approx(told.judge(built.graph_module).divergence, rel=1e-6)


def test_of_many_held_out_batches_stages_are_judged_on_the_first_few_and_that_is_told():
    guide = captured.mlp()
    held_out = batches_of(guide, 9, seed=7)
    told = training(guide, task(output="softmax"), Recipe.named("fast"), held_out=held_out)
    conversion = converted(make_plan(guide, "mlp"), told)
    assert conversion.notes[-1] == "stages were judged on the first 5 of 9 held-out batches"
    few = training(guide, task(output="softmax"), Recipe.named("fast"), held_out=held_out[:5]).judge
    whole = training(guide, task(output="softmax"), Recipe.named("fast"), held_out=held_out).judge
    graph_module = conversion.hybrid.graph_module
    last = conversion.snapshots[-1].evaluation.divergence
    assert last == pytest.approx(few(graph_module).divergence, rel=1e-6)
    assert conversion.final.divergence == pytest.approx(whole(graph_module).divergence, rel=1e-6)


@pytest.mark.parametrize(("layers", "judged"), [(8, 4), (16, 2)])
def test_the_more_stages_there_are_the_fewer_batches_each_is_judged_on(layers, judged):
    guide = capture(models.mlp(depth=layers), {"input": models.vectors(2, 8)})
    held_out = batches_of(guide, 5, seed=7)
    told = training(guide, task(output="softmax"), recipe(0, "none"), held_out=held_out)
    conversion = converted(make_plan(guide, "mlp", granularity="finest"), told)
    assert len(conversion.snapshots) == layers
    assert conversion.notes[-1] == f"stages were judged on the first {judged} of 5 held-out batches"


def test_of_a_batch_that_is_too_large_for_many_stages_some_rows_tell_the_divergence():
    guide = capture(models.mlp(depth=48), {"input": models.vectors(2, 8)})
    held_out = batches_of(guide, 5, seed=7)
    with_loss = task(output="softmax", loss=lambda output, batch: output.square().mean())
    told = training(guide, with_loss, recipe(0, "none"), held_out=held_out)
    conversion = converted(make_plan(guide, "mlp", granularity="finest"), told)
    assert conversion.notes[-1] == "stages were judged by the divergence on 1 of the 16 rows of a held-out batch"
    last = conversion.snapshots[-1].evaluation
    few = {"input": held_out[0][1]["input"][:1]}
    graph_module = conversion.hybrid.graph_module
    expected = training(guide, with_loss, recipe(0, "none"), held_out=[(few, few)]).judge(graph_module)
    assert last.loss is None
    assert last.divergence == pytest.approx(expected.divergence, rel=1e-6)
    assert conversion.final == training(guide, with_loss, recipe(0, "none"), held_out=held_out).judge(graph_module)


def test_snapshots_hold_a_part_that_does_not_change_once():
    conversion = run(captured.mlp(), settings=Recipe.named("fast"))
    first, second, third = (s.state for s in conversion.snapshots)
    assert list(third) == ["part_0", "part_1", "part_2"]
    assert first["part_0"] is second["part_0"] is third["part_0"]
    assert second["part_1"] is third["part_1"]


def test_a_hybrid_that_shared_the_guides_weights_shares_none_at_the_end():
    guide = captured.gpt2()
    bound_plan = make_plan(guide, "rnn")
    hybrid = build_hybrid(bound_plan, share=True)
    theirs = {p.data_ptr() for p in guide.graph_module.parameters()}
    assert not theirs.isdisjoint(p.data_ptr() for p in hybrid.graph_module.parameters())
    told = training(guide, task(logits="softmax"), Recipe.named("fast"))
    conversion = tune(told, align(bound_plan, hybrid, told))
    own = {p.data_ptr() for p in conversion.hybrid.graph_module.parameters()}
    assert theirs.isdisjoint(own)
    kept = {v.data_ptr() for s in conversion.snapshots for state in s.state.values() for v in state.values()}
    assert kept.isdisjoint(own)


def test_what_the_judge_knows_of_a_batch_is_known_of_its_first_rows_where_rows_are_apart(monkeypatch):
    guide = captured.gpt2()
    told = training(guide, task(logits="softmax"), recipe(0, "none"))
    judge, (_, inputs) = told.judge, told.feed.held_out[0]
    judge(guide.graph_module)
    few = {name: value[:3] for name, value in inputs.items()}
    for apart in (False, True):
        monkeypatch.setitem(judge.guide.meta, "rows_apart", apart)
        known = judge.known_rows(0, 3)
        assert (known is not None) is apart
    torch.testing.assert_close(known["logits"], guide.graph_module(**few)["logits"])
    judge.forget()
    assert judge.known_rows(0, 3) is None


@pytest.mark.parametrize("loss", [None, lambda output, batch: output["logits"].square().mean()])
def test_what_is_chosen_by_a_loss_needs_no_output_of_the_guide(loss):
    guide = captured.gpt2()
    hybrid = build_hybrid(make_plan(guide, "rnn")).graph_module
    unasked = None if loss is None else lambda *_: pytest.fail("the metric was asked for")
    judge = training(guide, task(loss=loss, metric=unasked, logits="softmax"), recipe(0, "none")).judge
    runs: list[object] = []
    with guide.graph_module.register_forward_hook(lambda *_: runs.append(_)):
        value = judge.value(hybrid, [0])
        assert bool(runs) is (loss is None)
        plain = training(guide, task(loss=loss, logits="softmax"), recipe(0, "none")).judge
        assert value == plain(hybrid, [0]).value == plain.value(hybrid, [0])
        assert plain.value(guide.graph_module) == plain(guide.graph_module).value


def test_some_rows_of_an_output_are_told_where_each_row_has_its_own():
    by_rows = capture(nn.Linear(4, 3), models.vectors(4, 4)).graph_module
    x = models.vectors(6, 4)
    torch.testing.assert_close(Gathered(by_rows).some_rows(by_rows(x), 2), by_rows(x[:2]))
    torch.testing.assert_close(Gathered(by_rows).some_rows(by_rows(x), 1, start=3), by_rows(x[3:4]))
    flat = capture(nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), models.vectors(4, 4)).graph_module
    assert Gathered(flat).some_rows(flat(x), 2) is None


@pytest.mark.parametrize(("tuned", "steps"), [(0.0, 4), (0.5, 8)])
def test_steps_that_alignment_leaves_are_taken_where_fine_tuning_has_a_share(tuned, steps):
    settings = recipe(8, "joint", share=0.5)
    settings = settings.model_copy(update={"fine_tuning": settings.fine_tuning.model_copy(update={"share": tuned})})
    conversion = run(captured.mlp(), settings=settings)
    assert conversion.steps == sum(curve.steps for curve in conversion.curves) == steps
