"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch

from tests import captured, models
from tests.models import tokens, vectors
from thesean.distill.snapshot import with_state
from thesean.passes.capture.capture import capture
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import bound_positions, build_hybrid, view_of
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target


def test_the_guide_stays_as_it_was():
    guide = captured.gpt2()
    before = {k: v.clone() for k, v in guide.graph_module.state_dict().items()}
    nodes = [n.name for n in guide.graph_module.graph.nodes]
    hybrid = build_hybrid(make_plan(guide, "rnn"))
    with torch.no_grad():
        for p in hybrid.graph_module.parameters():
            p.add_(1)
    assert [n.name for n in guide.graph_module.graph.nodes] == nodes
    assert all(torch.equal(v, before[k]) for k, v in guide.graph_module.state_dict().items())


def test_no_part_replaced_is_the_guide():
    guide = captured.gpt2()
    hybrid = build_hybrid(make_plan(guide, "rnn"), 0)
    assert not hybrid.parts
    assert not hybrid.replacements
    ids = tokens(2, 6)
    assert torch.equal(hybrid.graph_module(ids)["logits"], guide.graph_module(ids)["logits"])


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_parts_are_replaced_in_order(count):
    hybrid = build_hybrid(make_plan(captured.gpt2(3), "rnn"), count)
    assert hybrid.parts == ("transformer.h.0", "transformer.h.1")[:count]
    assert [r.name for r in hybrid.replacements] == ["part_0", "part_1"][:count]
    assert hybrid.graph_module(tokens(2, 6))["logits"].shape == (2, 6, 32)


def test_any_parts_are_replaced_by_their_numbers():
    guide = captured.gpt2(3)
    bound_plan = make_plan(guide, "rnn")
    hybrid = build_hybrid(bound_plan, [2, 0])
    assert [(r.name, r.part) for r in hybrid.replacements] == [("part_0", 0), ("part_2", 2)]
    assert hybrid.parts == ("transformer.h.0", "transformer.h.1", "transformer.h.2")
    assert hybrid.boundaries[1] == (bound_plan.parts[1].region.exit.name,) * 2
    kept = {k for k in hybrid.graph_module.state_dict() if "transformer.h.1.attn" in k}
    assert kept == {k for k in guide.graph_module.state_dict() if "transformer.h.1.attn" in k}


def test_a_view_holds_a_hybrids_own_modules_in_the_guide_itself():
    guide = captured.gpt2(3)
    bound_plan = make_plan(guide, "rnn")
    hybrid = build_hybrid(bound_plan)
    state = torch.get_rng_state()
    view = view_of(bound_plan, hybrid, [1])
    assert torch.equal(torch.get_rng_state(), state)
    (r,) = view.replacements
    assert view.module(r) is hybrid.module(hybrid.of_part(1)[0])
    assert r.copied == hybrid.of_part(1)[0].copied == ("query", "key", "value", "output")
    theirs = {id(p) for p in guide.graph_module.parameters()}
    assert {id(p) for n, p in view.graph_module.named_parameters() if not n.startswith("part_")} <= theirs
    ids = tokens(2, 6)
    alone = with_state(bound_plan, [1], {r.name: hybrid.module(r).state_dict()})
    assert torch.equal(view.graph_module.eval()(ids)["logits"], alone.graph_module(ids)["logits"])


def test_what_fits_is_copied_from_the_guide():
    guide = captured.gpt2()
    hybrid = build_hybrid(make_plan(guide, "linear-attention"))
    for replacement in hybrid.replacements:
        assert replacement.copied == ("query", "key", "value", "output")
    fresh = build_hybrid(make_plan(guide, "linear-attention"), copy_weights=False)
    assert [r.copied for r in fresh.replacements] == [(), ()]


def test_the_same_seed_gives_the_same_modules():
    bound_plan = make_plan(captured.gpt2(), "gru")
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_hybrid(bound_plan).graph_module.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_fewer_parts_draw_the_same_weights():
    bound_plan = make_plan(captured.gpt2(), "gru")
    torch.manual_seed(5)
    one = build_hybrid(bound_plan, 1)
    torch.manual_seed(5)
    two = build_hybrid(bound_plan)
    first, second = (h.module(h.replacements[0]).state_dict() for h in (one, two))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("guide", "target"), [(captured.gpt2, "gru"), (captured.resnet, "mlp"), (captured.tied, "mlp")]
)
def test_boundaries_name_the_exit_of_each_part_in_both_graphs(guide, target):
    bound_plan = make_plan(guide(), target)
    hybrid = build_hybrid(bound_plan)
    inputs = guide().signature.random_inputs(dict.fromkeys(guide().signature.symbols, 4))
    own = intermediates(hybrid.graph_module, [b[0] for b in hybrid.boundaries], with_output=False)(**inputs)
    theirs = intermediates(guide().graph_module, [b[1] for b in hybrid.boundaries], with_output=False)(**inputs)
    assert len(hybrid.boundaries) == len(hybrid.parts)
    for mine, guides in hybrid.boundaries:
        assert own[mine].shape == theirs[guides].shape
    replaced = {r.guide_exit for r in hybrid.replacements if r.part == 0}
    if bound_plan.parts[0].region.exit.name in replaced:
        assert hybrid.boundaries[0][0] == hybrid.replacements[0].exit


def test_the_module_reads_entry_and_gives_exit():
    hybrid = build_hybrid(make_plan(captured.gpt2(), "gru"))
    names = [n for r in hybrid.replacements for n in (r.entry, r.exit)]
    values = intermediates(hybrid.graph_module, names, with_output=False)(tokens(2, 6))
    for r in hybrid.replacements:
        y_BTD, _ = hybrid.module(r)(values[r.entry])
        torch.testing.assert_close(values[r.exit], y_BTD)


def test_joins_are_where_a_branch_is_added_to_its_stream():
    guide = captured.gpt2()
    hybrid = build_hybrid(make_plan(guide, "gru"))
    for r in hybrid.replacements:
        assert r.join is not None
        assert r.guide_join is not None
        total, stream = r.join
        values = intermediates(hybrid.graph_module, [total, stream, r.exit], with_output=False)(tokens(2, 6))
        torch.testing.assert_close(values[total], values[stream] + values[r.exit])
        theirs = intermediates(guide.graph_module, [r.guide_join, r.guide_exit], with_output=False)(tokens(2, 6))
        assert theirs[r.guide_join].shape == values[total].shape


def test_a_whole_block_is_joined_to_nothing():
    hybrid = build_hybrid(make_plan(captured.gpt2(), Target("gru", scope="part")))
    assert [(r.join, r.guide_join) for r in hybrid.replacements] == [(None, None)] * 2


def test_a_network_that_was_converted_can_be_converted_again():
    first = build_hybrid(make_plan(captured.gpt2(), "gru", keep=["*.1"])).graph_module
    again = build_hybrid(make_plan(capture(first, tokens()), "mingru", keep=["*.0*"]))
    assert [n.target for n in again.graph_module.graph.find_nodes(op="call_module")] == ["part2_0"]
    assert again.graph_module(tokens(2))["logits"].shape == (
        2,
        models.LENGTH,
        32,
    )  # a guide with a cell keeps its length


def test_the_weights_of_a_part_are_those_of_its_modules():
    hybrid = build_hybrid(make_plan(captured.mlp(), "mlp"))
    assert len(hybrid.of_part(1)) == 1
    expected = list(hybrid.graph_module.part_1.parameters())
    assert [id(p) for p in hybrid.parameters_of([1])] == [id(p) for p in expected]


def test_a_hybrid_of_tied_layers_runs():
    hybrid = build_hybrid(make_plan(captured.tied(), "mlp", keep=["second"]))
    assert hybrid.parts == ("first", "third")
    assert hybrid.graph_module(vectors(2, 8)).shape == (2, 8)
    second, head = (n.args[1] for n in hybrid.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert second.meta["val"] is head.meta["val"]
    assert second.meta["val"] is not next(iter(captured.tied().graph_module.parameters()))


def test_positions_past_the_table_are_bounded_once_and_told():
    graph_module = build_hybrid(make_plan(captured.gpt2(), "gru")).graph_module
    assert bound_positions(graph_module, "cut") == (  # type: ignore[arg-type]
        "bound positions: expected one of clamp, wrap, drop, refuse, found 'cut'."
    )
    assert bound_positions(graph_module, "refuse") == ""
    assert bound_positions(graph_module, "wrap") == "positions past the guide's table: wrap"
    assert bound_positions(graph_module, "wrap") == ""
    assert graph_module(tokens(2, 100))["logits"].shape == (2, 100, 32)
