"""Blocks of an attention and an MLP that become one module: what asks for it, and what comes of it.

B batch, T time, D width
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import thesean
from tests import captured, models
from tests.causal_guides import family
from tests.exported import hybrid
from thesean.deploy.export import export
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import bind_plan, make_plan
from thesean.passes.plan.plan import Plan
from thesean.targets import Target


def families(bound_plan) -> set[str]:
    return {r.family for r in build_hybrid(bound_plan).replacements}


def test_rnn_takes_whole_blocks_where_blocks_are_asked_for():
    plan = make_plan(captured.gpt2(), "rnn", granularity="block")
    assert [(p.scope, p.replaces) for p in plan.plan] == [("part", (p.path,)) for p in plan.plan]
    assert families(plan) == {"parallel-block"}


def test_rnn_leaves_the_mlps_to_the_guide_where_nothing_is_said():
    plan = make_plan(captured.gpt2(), "rnn")
    assert [(p.scope, p.replaces) for p in plan.plan] == [(None, (f"{p.path}.attn",)) for p in plan.plan]
    assert families(plan) == {"linear-attention"}


@pytest.mark.parametrize("settings", [{"merge": 2}, {"parts": ["transformer.h.*"]}])
def test_merged_and_listed_parts_are_replaced_as_before(settings):
    plan = make_plan(captured.gpt2(), "rnn", granularity="block", **settings)
    assert families(plan) <= {"linear-attention", "identity"}


def test_a_target_that_says_what_it_replaces_is_left_alone():
    plan = make_plan(captured.gpt2(), Target("rnn", scope="mixing"), granularity="block")
    assert families(plan) == {"linear-attention"}
    assert families(make_plan(captured.gpt2(), "gru", granularity="block")) == {"gru"}
    assert families(make_plan(captured.gpt2(), Target("rnn", scope="part"))) == {"parallel-block"}


def test_blocks_of_another_kind_are_replaced_as_before():
    mixer = captured.token_mixer()
    with_blocks, without = (make_plan(mixer, "rnn", **g) for g in ({"granularity": "block"}, {}))
    assert [(p.scope, p.replaces) for p in with_blocks.plan] == [(p.scope, p.replaces) for p in without.plan]


def test_a_plan_for_whole_blocks_is_read_again():
    guide = captured.gpt2()
    made = make_plan(guide, Target("rnn", taps=2), granularity="block")
    again = bind_plan(guide, Plan.from_yaml(made.plan.to_yaml()))
    assert [p.planned for p in again.parts] == [p.planned for p in made.parts]


@torch.no_grad()
def test_a_guide_whose_blocks_are_parallel_already_is_what_it_was_where_a_window_holds_all_tokens():
    guide = family("gpt_neox")
    target = Target("parallel-block", window=11, sinks=0)
    module = build_hybrid(make_plan(guide, target)).graph_module.eval()
    (name,) = guide.example
    ids = models.tokens(3, 11)
    want, found = (m(**{name: ids})["logits"] for m in (guide.graph_module, module))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_the_norm_after_the_last_sum_stays_the_guides():
    guide = captured.bert()
    plan = make_plan(guide, "parallel-block")
    made = build_hybrid(plan)
    kept = {n: p for n, p in made.graph_module.named_parameters() if "LayerNorm" in n and "output" in n}
    assert len(kept) == 2 * 2  # weight and bias of each block's last norm
    theirs = dict(guide.graph_module.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in kept.items())
    for r, part in zip(made.replacements, plan.parts, strict=True):
        assert r.guide_exit in {n.name for n in part.region.exit.all_input_nodes}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        pytest.param("gpt2", {"window": 5, "taps": 2, "hidden": 16}, marks=pytest.mark.thorough),
        pytest.param("llama", {"window": 6}, marks=pytest.mark.thorough),
        pytest.param("llama", {"window": 0, "taps": 1}, marks=pytest.mark.thorough),
    ],
)
def test_it_is_written_with_its_states_and_without(name, options, tmp_path: Path):
    """The export compares with torch, in chunks and step by step."""
    pytest.importorskip("onnxscript")
    guide = getattr(captured, name)()
    module = hybrid(guide, Target("parallel-block", **options))
    for stateful in (True, False):
        report = export(module, guide.signature, tmp_path / f"{stateful}.onnx", stateful=stateful, train_length=30)
        assert report.stateful == stateful
        assert max(check.max_abs_error for check in report.checks) < 1e-4


def test_it_is_saved_and_read_again(tmp_path: Path):
    data = models.token_batches()
    converted = thesean.compile(models.gpt2(), "rnn", granularity="block", data=data, recipe="fast", progress=False)
    converted.save(tmp_path / "saved")
    again = thesean.load(tmp_path / "saved")
    ids = data[0]["input_ids"]
    torch.testing.assert_close(again(input_ids=ids)["logits"], converted(input_ids=ids)["logits"], rtol=0, atol=0)
