"""Fewer target parts than guide parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.captured import flow_of
from tests.models import tokens
from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.divide import divide
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.leave_out import LeavingOut
from thesean.passes.plan.make_plan import bind_plan, make_plan
from thesean.passes.plan.merge import merge_by_count, merge_to_count, most_missed, regroup, singles
from thesean.passes.plan.partition import partition
from thesean.passes.plan.plan import Plan
from thesean.passes.remove import Remove
from thesean.targets import Target


def test_pairs_of_blocks_become_one_part_with_both_as_members():
    flow = flow_of(captured.gpt2(4))
    groups = merge_by_count(flow, partition(flow), 2)
    assert [g.path for g in groups] == ["transformer.h.0..1", "transformer.h.2..3"]
    assert [m.path for m in groups[1].members] == ["transformer.h.2", "transformer.h.3"]
    assert groups[0].region.exit is groups[1].region.entry


@pytest.mark.thorough
def test_the_last_of_an_odd_number_stays_alone():
    flow = flow_of(captured.gpt2(3))
    assert [len(g.members) for g in merge_by_count(flow, partition(flow), 2)] == [2, 1]


def quiet(*blocks: int) -> Captured:
    """A GPT-2 of four blocks, these of which give what they read; the others change their stream much."""
    torch.manual_seed(0)
    model: Any = models.gpt2(4)
    with torch.no_grad():
        for k, block in enumerate(model.transformer.h):
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                linear.weight.mul_(0 if k in blocks else 5)
                linear.bias.zero_()
    return capture(model, {"input_ids": tokens(4, 9)})


def leaving_out(guide: Captured) -> LeavingOut:
    return LeavingOut(guide.graph_module, guide.example)


class Rows(nn.Module):
    """x_ND -> y_NP, whose columns lie around means that are far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([-100.0, 100.0]))

    def forward(self, x: torch.Tensor, without: int = -1) -> torch.Tensor:
        for k, block in enumerate(self.blocks):
            x = x if k == without else x + block(x).relu()
        return self.head(x)


def test_what_is_lost_is_counted_in_each_outputs_own_variance():
    model, x = models.seeded(Rows), models.vectors(16, 4)
    guide = capture(model, {"x": x})
    found = [leaving_out(guide).lost([g.region]) for g in partition(flow_of(guide))]
    y = model(x)
    spread = (y - y.mean(0)).square().sum()
    wanted = [(model(x, without=k) - y).square().sum() / spread for k in range(2)]
    assert found == pytest.approx([w.item() for w in wanted], rel=1e-4)
    assert min(found) > 0.01


def test_a_block_that_does_nothing_is_merged_first_and_the_other_stays():
    guide = quiet(2)
    flow = flow_of(guide)
    chosen = partition(flow)
    lost = [leaving_out(guide).lost([c.region]) for c in chosen]
    assert lost[2] == 0
    assert min(lost[:2] + lost[3:]) > 0.01
    groups, stays = merge_to_count(flow, chosen, 3, leaving_out(guide))
    assert [len(g.members) for g in groups] == [1, 2, 1]
    assert stays == {"transformer.h.1..2": "transformer.h.1"}


def test_what_goes_next_is_tried_together_with_what_is_gone(monkeypatch: pytest.MonkeyPatch):
    flow = flow_of(captured.gpt2(4))
    chosen = partition(flow)
    asked = leaving_out(captured.gpt2(4))
    cost = {"0": 9.0, "1": 0.1, "2": 0.2, "3": 0.3, "12": 5.0, "13": 0.5, "23": 5.0, "01": 9.0}
    names = {c.region.exit.name: c.path[-1] for c in chosen}
    monkeypatch.setattr(asked, "lost", lambda regions: cost["".join(sorted(names[r.exit.name] for r in regions))])
    groups, stays = merge_to_count(flow, chosen, 2, asked)
    assert [g.path for g in groups] == ["transformer.h.0..1", "transformer.h.2..3"]
    assert stays == {"transformer.h.0..1": "transformer.h.0", "transformer.h.2..3": "transformer.h.2"}


def test_neighbours_are_left_out_in_any_order():
    guide = captured.gpt2(4)
    regions = [c.region for c in partition(flow_of(guide))][1:3]
    by_hand = clone(guide.graph_module)
    for path in ("transformer.h.1", "transformer.h.2"):
        Remove(path, next(c.region for c in partition(flow_of_module(by_hand)) if c.path == path))(by_hand)
    with torch.no_grad():
        wanted = guide.graph_module(**guide.example)["logits"].flatten(0, 1)
        found = by_hand(**guide.example)["logits"].flatten(0, 1)
    error = ((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()
    assert error > 1e-3
    for order in (regions, regions[::-1]):
        assert leaving_out(guide).lost(order) == pytest.approx(error, rel=1e-4)


def test_of_a_merged_part_the_member_stays_that_is_missed_most():
    guide = quiet(0, 2)
    group = merge_by_count(flow_of(guide), partition(flow_of(guide)), 3)[0]
    assert most_missed(group, leaving_out(guide)).path == "transformer.h.1"
    merged = divide(guide, merge=2)
    assert [m.path for m in merged.members()] == ["transformer.h.1", "transformer.h.3"]
    alone = divide(captured.gpt2(4))
    assert [m.path for m in alone.members()] == [f"transformer.h.{k}" for k in range(4)]


def test_two_members_that_change_the_shape_do_not_merge():
    flow = flow_of(captured.resnet())  # blocks 2 and 4 open stages
    groups = merge_by_count(flow, partition(flow), 3)
    assert [[m.path.rpartition(".")[2] for m in g.members] for g in groups] == [["0", "1", "2"], ["3", "4", "5"]]
    assert [len(g.members) for g in merge_by_count(flow, partition(flow), 6)] == [4, 2]


def test_branches_with_a_sum_in_between_do_not_merge():
    flow = flow_of(captured.gpt2())
    with pytest.raises(PlanError, match=r"merge=2: no two parts follow each other: transformer\.h\.0\.attn"):
        merge_by_count(flow, partition(flow, "sublayer"), 2)


@pytest.mark.parametrize("wanted", [0, 5, -1])
def test_a_number_of_parts_that_there_can_not_be_is_refused(wanted):
    guide = captured.gpt2(4)
    flow = flow_of(guide)
    with pytest.raises(PlanError, match=f"target_parts: expected 1 to 4, .*found {wanted}"):
        merge_to_count(flow, partition(flow), wanted, leaving_out(guide))


def test_more_merging_than_the_graph_allows_is_refused():
    guide = captured.resnet()
    flow = flow_of(guide)
    with pytest.raises(PlanError, match="no more than down to 2 parts can be merged"):
        merge_to_count(flow, partition(flow), 1, leaving_out(guide))


def test_merge_and_target_parts_together_are_refused():
    with pytest.raises(PlanError, match="give one of them"):
        make_plan(captured.gpt2(4), "copy", merge=2, target_parts=2)


def test_copy_drops_all_members_but_one():
    guide = captured.gpt2(4)
    bound_plan = make_plan(guide, "copy", merge=2)
    kept = [p.keeps for p in bound_plan.plan if p.keeps is not None]
    dropped = [s.facts.path for p in bound_plan.parts for s in p.sites]
    assert sorted([*kept, *dropped]) == [f"transformer.h.{i}" for i in range(4)]
    hybrid = build_hybrid(bound_plan)
    by_hand = clone(guide.graph_module)
    for path in dropped:
        region = next(c.region for c in partition(flow_of_module(by_hand)) if c.path == path)
        Remove(path, region)(by_hand)
    ids = tokens(3, 7)
    assert torch.equal(hybrid.graph_module(ids)["logits"], by_hand(ids)["logits"])
    assert bound_plan.plan.new_params == sum(p.numel() for p in hybrid.graph_module.parameters())


def flow_of_module(graph_module):
    from thesean.passes.analyse.dataflow import data_flow

    return data_flow(graph_module.graph)


def test_a_recurrence_replaces_the_attention_of_the_member_that_stays():
    bound_plan = make_plan(captured.gpt2(4), "gru", merge=2)
    for part in bound_plan.parts:
        inner = [s for s in part.sites if s.target.name == "gru"]
        assert [s.facts.path for s in inner] == [f"{part.planned.keeps}.attn"]
        assert len(part.sites) == 2


def test_scope_part_replaces_a_merged_part_by_one_module():
    bound_plan = make_plan(captured.gpt2(4), Target("gru", scope="part"), target_parts=1)
    assert [len(p.sites) for p in bound_plan.parts] == [1]
    assert bound_plan.plan.parts[0].keeps is None
    assert len(build_hybrid(bound_plan).replacements) == 1


def test_copy_has_nothing_to_do_where_nothing_was_merged():
    with pytest.raises(PlanError, match="nothing is replaced"):
        make_plan(captured.gpt2(), "copy")
    with pytest.raises(TargetMismatchError, match=r"transformer\.h\.0: target 'copy' has nothing .*merge parts"):
        make_plan(captured.gpt2(), "copy", parts=["transformer.h.0"])


def test_a_merged_plan_survives_yaml_and_an_edit_of_what_stays():
    guide = captured.gpt2(4)
    plan = make_plan(guide, "copy", merge=2).plan
    again = Plan.from_yaml(plan.to_yaml())
    assert again == plan
    other = next(m for m in plan.parts[0].members if m != plan.parts[0].keeps)
    edited = replace(plan, parts=(replace(plan.parts[0], keeps=other), *plan.parts[1:]))
    bound_plan = bind_plan(guide, edited)
    assert bound_plan.plan.parts[0].keeps == other
    assert bound_plan.plan.parts[0].replaces == (plan.parts[0].keeps,)
    wrong = replace(plan, parts=(replace(plan.parts[0], keeps="transformer.h.3"), *plan.parts[1:]))
    with pytest.raises(PlanError, match=r"keeps 'transformer\.h\.3', which is none of its members"):
        bind_plan(guide, wrong)


def test_globs_match_a_merged_part_by_its_name_or_by_all_its_members():
    by_members = make_plan(captured.gpt2(4), {"*.h.[01]": "keep", "*": "copy"}, merge=2).plan
    assert [p.target for p in by_members] == ["keep", "copy"]
    by_name = make_plan(captured.gpt2(4), {"*.h.0..1": "keep", "*": "copy"}, merge=2).plan
    assert [p.target for p in by_name] == ["keep", "copy"]


def test_parts_around_one_that_was_not_chosen_do_not_merge():
    with pytest.raises(PlanError, match="merge=2: no two parts follow each other"):
        make_plan(captured.gpt2(4), "copy", parts=["transformer.h.0", "transformer.h.2"], merge=2)


def test_the_groups_of_a_plan_come_back():
    flow = flow_of(captured.gpt2(4))
    chosen = partition(flow)
    groups = merge_by_count(flow, chosen, 2)
    again = regroup(flow, chosen, [[m.path for m in g.members] for g in groups])
    assert [g.region for g in again] == [g.region for g in groups]
    assert regroup(flow, chosen, [[c.path] for c in chosen]) == singles(chosen)
    with pytest.raises(PlanError, match="can't be merged"):
        regroup(flow, chosen, [["transformer.h.0", "transformer.h.2"]])
