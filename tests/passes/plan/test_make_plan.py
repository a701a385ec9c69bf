from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.models import vectors
from thesean.errors import PlanError, TargetMismatchError, UnknownNameError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.plan.make_plan import bind_plan, make_plan
from thesean.targets import PartFacts, Target


def targets(guide, target, **settings):
    return {p.path: p.target for p in make_plan(guide, target, **settings).plan}


@pytest.mark.thorough
def test_one_target_is_for_all_parts():
    assert targets(captured.gpt2(), "gru") == {"transformer.h.0": "gru", "transformer.h.1": "gru"}


def test_a_mapping_gives_each_part_its_own_and_keeps_the_rest():
    assert targets(captured.gpt2(), {"*.1": "gru"}) == {"transformer.h.0": "keep", "transformer.h.1": "gru"}
    assert targets(captured.gpt2(), {"*.0": "keep", "transformer.h.*": "mingru"}) == {
        "transformer.h.0": "keep",
        "transformer.h.1": "mingru",
    }


def test_the_first_glob_that_matches_wins():
    assert targets(captured.gpt2(), {"*.1": "gru", "*": "mingru"}) == {
        "transformer.h.0": "mingru",
        "transformer.h.1": "gru",
    }


def test_globs_over_sublayers_ask_for_sublayers():
    found = targets(captured.gpt2(), {"*.attn": "gru"})
    assert found == {
        "transformer.h.0.attn": "gru",
        "transformer.h.0.mlp": "keep",
        "transformer.h.1.attn": "gru",
        "transformer.h.1.mlp": "keep",
    }
    assert targets(captured.gpt2(), {"*.mlp": Target("mlp", width=8)})["transformer.h.1.mlp"] == "mlp"


def test_a_module_outside_of_all_blocks_is_a_part_where_it_is_named():
    assert targets(captured.gpt2(), {"lm_head": "linear"}) == {"lm_head": "linear"}
    both = {"lm_head": "linear", "transformer.h.1.attn": "gru"}
    assert targets(captured.gpt2(), both) == {"transformer.h.1.attn": "gru", "lm_head": "linear"}
    with pytest.raises(PlanError, match=r"'lm_head' is a module and no part beside .* parts=\['lm_head'\]"):
        make_plan(captured.gpt2(), {"lm_head": "linear", "*": "gru"})


def test_keep_leaves_parts_to_the_guide():
    assert targets(captured.gpt2(), "gru", keep=["*.0"]) == {"transformer.h.0": "keep", "transformer.h.1": "gru"}


@pytest.mark.parametrize(
    ("target", "settings", "reason"),
    [
        ("gru", {"keep": ["*.7"]}, "keep: no part matches"),
        ({"*.7": "gru"}, {}, "target: no part matches"),
        ({"*.7": "gru"}, {"parts": ["transformer.h.*"]}, "target: no part matches"),
        ("gru", {"parts": ["h.*"]}, "parts: no part matches"),
        ("gru", {"keep": ["*"]}, "nothing is replaced"),
        ({}, {}, "nothing is replaced"),
        ({"*": "keep"}, {}, "nothing is replaced"),
    ],
)
def test_globs_without_a_match_and_plans_without_a_part_are_refused(target, settings, reason):
    with pytest.raises(PlanError, match=reason):
        make_plan(captured.gpt2(), target, **settings)


@pytest.mark.parametrize("target", [None, 3, ("gru",)])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(PlanError, match="target: expected a name, a Target or"):
        make_plan(captured.gpt2(), target)


def test_a_lone_glob_may_stand_for_a_list():
    assert targets(captured.gpt2(), "gru", keep="*.0") == {"transformer.h.0": "keep", "transformer.h.1": "gru"}
    assert targets(captured.gpt2(), "gru", parts="*.h.1") == {"transformer.h.1": "gru"}


def test_unknown_targets_and_options_are_refused():
    with pytest.raises(UnknownNameError, match=r"unknown target 'rn'; did you mean 'rnn'\? known: .*gru"):
        make_plan(captured.gpt2(), "rn")
    with pytest.raises(UnknownNameError, match="rn"):
        make_plan(captured.gpt2(), {"*.0": "rn"})
    with pytest.raises(TargetMismatchError, match=r"option 'wide'.*known options: .*width"):
        make_plan(captured.gpt2(), Target("gru", wide=3))


def test_an_mlp_for_a_causal_part_is_refused_with_the_part_and_a_way_out():
    with pytest.raises(TargetMismatchError, match=r"transformer\.h\.0: .*causal.*Choose target 'rnn'"):
        make_plan(captured.gpt2(), "mlp")


def test_an_mlp_for_an_unbounded_sequence_is_refused():
    with pytest.raises(TargetMismatchError, match=r"encoder\.layer\.0: .*static dimensions.*unbounded"):
        make_plan(captured.bert(), "mlp")


def test_a_recurrence_for_feature_maps_is_refused_naming_the_part():
    with pytest.raises(TargetMismatchError, match=r"blocks\.0.*expected a sequence .*Choose target 'mlp'"):
        make_plan(captured.resnet(), "rnn")


@pytest.mark.parametrize(("division", "kept"), [({}, "transformer.h.0"), ({"merge": 2}, "transformer.h.0..1")])
def test_a_place_that_does_not_fit_is_refused_with_the_part_around_it_to_keep(division, kept):
    told = rf"transformer\.h\.0\.mlp: target 'narrow-heads' .*Keep it with keep=\['{re.escape(kept)}'\]"
    with pytest.raises(TargetMismatchError, match=told):
        make_plan(captured.gpt2(), Target("narrow-heads", scope="token-wise"), **division)


def test_a_mixing_target_asked_for_a_token_wise_part_by_name_is_refused():
    with pytest.raises(TargetMismatchError, match=r"transformer\.h\.0\.mlp: target 'gru' has nothing to replace here"):
        make_plan(captured.gpt2(), {"*.mlp": "gru"})


def test_an_attention_whose_weights_are_an_output_is_refused_by_that_reason():
    guide = models.gpt2(1, attention="eager")
    guide.config.output_attentions = True
    told = r"transformer\.h\.0\.attn can't be cut out: .* output of the guide.*output_attentions=False"
    with pytest.raises(PlanError, match=told):
        make_plan(captured.capture(guide, models.tokens()), "gru")


def test_a_mixing_target_leaves_token_wise_sublayers_alone():
    found = targets(captured.gpt2(), "gru", granularity="sublayer")
    assert found["transformer.h.0.attn"] == "gru"
    assert found["transformer.h.0.mlp"] == "keep"


def test_a_mixing_target_replaces_the_attention_of_a_block_and_keeps_its_mlp():
    bound_plan = make_plan(captured.gpt2(), "gru")
    assert [[s.facts.path for s in p.sites] for p in bound_plan.parts] == [
        ["transformer.h.0.attn"],
        ["transformer.h.1.attn"],
    ]
    part = bound_plan.plan.parts[0]
    assert part.replaces == ("transformer.h.0.attn",)
    assert part.mixing == "causal"
    assert part.input_shape == part.output_shape == ("batch", "time", 16)


def test_scope_part_replaces_the_whole_block():
    bound_plan = make_plan(captured.gpt2(), Target("gru", scope="part"))
    assert [[s.facts.path for s in p.sites] for p in bound_plan.parts] == [["transformer.h.0"], ["transformer.h.1"]]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_token_wise_target_replaces_the_mlp_of_a_block_and_keeps_its_attention(name):
    bound_plan = make_plan(getattr(captured, name)(), Target("narrow", ratio=0.5))
    sites = [s for p in bound_plan.parts for s in p.sites]
    assert len(sites) == len(bound_plan.parts) == 2
    assert all(s.facts.mixing == "none" and s.facts.mlp is not None and s.facts.attention is None for s in sites)
    mixing = make_plan(getattr(captured, name)(), "gru")
    assert not {n for s in sites for n in s.region.nodes} & {
        n for p in mixing.parts for s in p.sites for n in s.region.nodes
    }


def test_facts_are_measured():
    (part, _) = make_plan(captured.gpt2(), "gru").parts
    facts = part.sites[0].facts
    assert (facts.mixing, facts.width_in, facts.width_out) == ("causal", 16, 16)
    assert facts.attention is not None
    assert facts.attention.heads == 2
    assert facts.params == 4 * 16 * 16 + 4 * 16


def test_a_builder_of_your_own_gets_the_facts():
    seen: list[PartFacts] = []

    def build(part: PartFacts) -> nn.Module:
        seen.append(part)
        return nn.Linear(part.width_in, part.width_out)

    bound_plan = make_plan(captured.mlp(), Target("mine", build=build))
    assert [p.target for p in bound_plan.plan] == ["mine"] * 3
    assert {f.input_shape for f in seen} == {("batch", 8)}
    assert bound_plan.plan.parts[0].new_params == 8 * 8 + 8
    again = bind_plan(captured.mlp(), bound_plan.plan)
    assert [p.target for p in again.plan] == ["mine"] * 3


def test_what_a_builder_gives_is_tried_in_the_guides_precision():
    guide = capture(models.mlp().double(), vectors(3, 8).double())
    bound_plan = make_plan(guide, Target("mine", build=lambda part: nn.Linear(part.width_in, part.width_out)))
    assert [p.target for p in bound_plan.plan] == ["mine"] * 3


class Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._up, self._down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._down(torch.tanh(self._up(x)))


def test_a_part_is_called_by_its_modules_also_where_they_are_private():
    plan = make_plan(capture(models.seeded(Private), vectors(3, 8)), "mlp").plan
    assert [part.path for part in plan] == ["_up.._down"]


def test_costs_add_up():
    plan = make_plan(captured.gpt2(), "gru", keep=["*.0"]).plan
    assert plan.params == sum(p.numel() for p in captured.gpt2().graph_module.parameters())
    part = plan.parts[1]
    assert plan.new_params == plan.params - part.params + part.new_params
    assert plan.new_flops == plan.flops - part.flops + part.new_flops


def test_drafting_draws_no_random_numbers_and_changes_no_weights():
    guide = captured.gpt2()
    before = {k: v.clone() for k, v in guide.graph_module.state_dict().items()}
    torch.manual_seed(3)
    make_plan(guide, "gru")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(v, before[k]) for k, v in guide.graph_module.state_dict().items())


def test_the_length_that_is_probed_at_is_no_other_dimension():
    guide = captured.gpt2()
    assert probe_sizes(guide) == {"batch": 2, "time": 11}


def test_a_plan_says_which_parts_lose_sight_of_later_steps():
    causal = Target("gru", causal=True)
    note, left = make_plan(captured.bert(), {"*.1": causal}).plan.notes
    assert note.startswith("encoder.layer.1 reads both ways; causal=True replacements read no later step")
    assert left == "encoder.layer.0 is kept and reads all steps: the network is no stream"
    note, state = make_plan(captured.bert(), causal).plan.notes
    assert note.startswith("encoder.layer.0, encoder.layer.1 read both ways")
    assert make_plan(captured.gpt2(), causal).plan.notes == (state,)


def test_a_plan_says_what_a_stream_carries_where_all_that_mixes_carries_a_state():
    (note,) = make_plan(captured.gpt2(), "gru").plan.notes
    assert note == "state: 128 B a row in float32, at any length"  # two of 16 numbers
    assert make_plan(captured.gpt2(), {"*.1": "gru"}).plan.notes == ()  # the other one's cache grows
    assert not any(n.startswith("state") for n in make_plan(captured.bert(), "rnn").plan.notes)


def test_a_plan_that_is_handed_in_is_told_of_once():
    guide = captured.gpt2()
    plan = make_plan(guide, "gru").plan
    assert bind_plan(guide, plan).plan.notes == plan.notes


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        (Target("rnn", lookahead=3), 6),
        (Target("gru", lookahead=2, scope="part"), 4),
        ({"*.0": Target("mingru", lookahead=3), "*.1": Target("conv", lookahead=1)}, 4),
    ],
)
def test_a_plan_says_how_late_a_stream_of_parts_that_look_ahead_is(target, steps):
    note, _ = make_plan(captured.bert(), target).plan.notes
    assert note == (
        f"encoder.layer.0, encoder.layer.1 read both ways; lookahead= comes to {steps} steps in a row, by which the "
        "outputs of a stream are late"
    )


def test_a_look_ahead_where_no_later_step_is_read_is_told_to_change_nothing():
    note, _ = make_plan(captured.gpt2(), Target("gru", lookahead=3)).plan.notes
    assert note == "transformer.h.0, transformer.h.1: lookahead= changes nothing, no later step is read there"


@pytest.mark.parametrize("target", ["narrow", Target("narrow", scope="part")], ids=str)
def test_a_convnet_that_should_get_fewer_channels_gets_them_or_is_told_what_does_it(target):
    assert {p.target for p in make_plan(captured.resnet(), target).plan.parts} == {"narrow"}
    with pytest.raises(PlanError, match="its channels go out of the whole part: leave scope= out"):
        make_plan(captured.resnet(), Target("narrow", scope="token-wise"))
    assert make_plan(captured.resnet(), Target("bottleneck", width=2)).plan.parts[0].new_params
