from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch import nn

from tests import captured
from thesean.errors import PlanError, TargetMismatchError, UnknownNameError, WriteError
from thesean.passes.plan.make_plan import bind_plan, make_plan
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import ProbedCandidate
from thesean.targets import Target


def gpt2_plan(target="gru", **settings) -> Plan:
    return make_plan(captured.gpt2(), target, **settings).plan


def test_a_plan_comes_back_from_yaml_as_it_was(tmp_path: Path):
    plan = gpt2_plan({"*.1": Target("gru", width=8, scope="part")}, parts=["transformer.h.*"])
    path = tmp_path / "plan.yaml"
    text = plan.to_yaml(path)
    assert Plan.from_yaml(path) == Plan.from_yaml(text) == plan
    assert path.read_text(encoding="utf-8") == text


def test_a_plan_prints_a_row_a_part_and_the_totals():
    plan = gpt2_plan(keep=["transformer.h.0"])
    lines = [line.rstrip() for line in str(plan).splitlines()]
    assert lines[0] == "1 of 2 parts replaced; FLOPs at batch 1, time 10"
    (kept,) = (line for line in lines if "transformer.h.0" in line)
    assert "causal" in kept
    assert "keep" in kept
    (replaced,) = (line for line in lines if "transformer.h.1" in line)
    assert "gru" in replaced
    assert "replaces attn" in replaced
    assert f"{plan.new_params / 1000:.3g} k" in next(line for line in lines if "whole model" in line)
    assert max(map(len, lines)) <= 140


def test_a_padding_mask_that_a_replacement_does_not_read_is_told():
    plan = make_plan(captured.bert(), Target("mine", build=lambda part: nn.Linear(part.width_in, part.width_out))).plan
    assert all(part.drops == ("attention_mask",) for part in plan)
    assert "attention_mask" in str(plan)


def test_one_that_it_reads_is_not():
    assert not any(part.drops for part in make_plan(captured.bert(), "gru").plan)


def test_editing_gives_a_copy():
    plan = gpt2_plan()
    edited = plan.edit("*.0", "keep").edit("*.1", Target("mingru", width=8))
    assert [p.target for p in plan] == ["gru", "gru"]
    assert [p.target for p in edited] == ["keep", "mingru"]
    assert [p.path for p in edited.replaced] == ["transformer.h.1"]
    assert edited.target_of("transformer.h.0") is None
    assert edited.target_of("transformer.h.1") == Target("mingru", width=8)


def test_editing_what_is_not_there_gives_the_near_name():
    with pytest.raises(PlanError, match=r"edit: no part matches 'transformer\.h\.2'; did you mean"):
        gpt2_plan().edit("transformer.h.2", "keep")


def test_editing_to_an_unknown_target_gives_the_near_name():
    with pytest.raises(UnknownNameError, match="did you mean 'gru'"):
        gpt2_plan().edit("*", "grü")


def test_editing_to_an_option_that_does_not_exist_is_refused():
    with pytest.raises(TargetMismatchError, match="option 'wide'"):
        gpt2_plan().edit("*", Target("gru", wide=8))


def test_an_edited_yaml_plan_is_what_is_drafted():
    text = gpt2_plan().to_yaml()
    data = yaml.safe_load(text)
    data["parts"][0] |= {"target": "keep"}
    data["parts"][1] |= {"target": "mingru", "options": {"width": 8}}
    bound_plan = bind_plan(captured.gpt2(), Plan.from_yaml(yaml.safe_dump(data)))
    assert [p.target.name if p.target else None for p in bound_plan.parts] == [None, "mingru"]
    assert bound_plan.plan.parts[1].options == {"width": 8}
    assert bound_plan.plan.parts[1].new_params != Plan.from_yaml(text).parts[1].new_params  # measured anew


def test_a_plan_of_another_guide_is_stale():
    with pytest.raises(PlanError, match=r"doesn't fit this guide: .*differs\. Make a new one"):
        bind_plan(captured.bert(), gpt2_plan())


def test_a_plan_whose_parts_were_reordered_is_stale():
    plan = gpt2_plan()
    data = yaml.safe_load(plan.to_yaml())
    data["parts"].reverse()
    with pytest.raises(PlanError, match="the order of parts differs"):
        bind_plan(captured.gpt2(), Plan.from_yaml(yaml.safe_dump(data)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"colour": "red"}, "colour"),
        ({"granularity": "layer"}, "granularity"),
        ({"parts": "all"}, "parts"),
        ({"params": "many"}, "params"),
        ({"parts": [{"path": "a", "target": "gru", "widht": 8}]}, "parts.0.widht"),
        ({"parts": [{"path": "a"}]}, "parts.0.target"),
        ({"parts": [{"path": "a", "target": "gru", "scope": "half"}]}, "parts.0.scope"),
    ],
)
def test_wrong_fields_are_named(change, field):
    data = yaml.safe_load(gpt2_plan().to_yaml()) | change
    with pytest.raises(PlanError, match=f"plan field {field}"):
        Plan.from_yaml(yaml.safe_dump(data))


def test_what_is_not_yaml_or_not_there_is_refused(tmp_path: Path):
    with pytest.raises(PlanError, match="the plan is not YAML"):
        Plan.from_yaml("parts: [\n  {\n")
    with pytest.raises(PlanError, match=r"can't read the plan .*No such file"):
        Plan.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="not a mapping with parts"):
        Plan.from_yaml("- a\n- b\n")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(PlanError):
        Plan.from_yaml(path)


def test_editing_to_keep_takes_a_part_out_of_the_totals():
    plan = gpt2_plan()
    edited = plan.edit("*", "keep")
    assert (edited.new_params, edited.new_flops) == (plan.params, plan.flops)
    again = edited.edit("*", "keep")
    assert (again.new_params, again.new_flops) == (plan.params, plan.flops)
    assert "replaces" not in str(edited)
    assert not edited.notes
    assert "edited: what the new targets cost is counted" in str(plan.edit("*.0", "mingru"))


def test_a_part_may_become_a_builder_of_ones_own():
    guide = captured.gpt2()
    mine = Target("mine", build=lambda part: nn.Linear(part.width_in, part.width_out))
    edited = make_plan(guide, "gru").plan.edit("*.0", mine)
    assert [p.target for p in edited] == ["mine", "gru"]
    bound_plan = bind_plan(guide, edited)
    assert bound_plan.plan.parts[0].new_params == 16 * 16 + 16


def test_a_block_names_its_halves():
    halves = make_plan(captured.gpt2(), "gru", granularity="sublayer", keep=["transformer.h.0"]).plan
    assert [p.target for p in halves] == ["keep", "keep", "gru", "keep"]
    assert [p.target for p in halves.edit("transformer.h.1", "keep")] == ["keep"] * 4


def test_a_plan_that_can_not_be_written_is_told(tmp_path: Path):
    with pytest.raises(WriteError, match=r"can't write .*nowhere"):
        gpt2_plan().to_yaml(tmp_path / "nowhere" / "plan.yaml")


def test_an_edited_plan_forgets_what_was_measured_of_the_one_before():
    probed = ProbedCandidate(
        path="transformer.h.0", target="gru", divergence=0.5, added_ms=None, params=8, flops=8, chosen=True
    )
    plan = replace(gpt2_plan(), candidates=(probed,))
    assert plan.edit("*.h.0", "rnn").candidates == ()
