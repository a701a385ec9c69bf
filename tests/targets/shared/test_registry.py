from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.targets.build import build
from thesean.errors import ArtifactError, TargetMismatchError, UnknownNameError
from thesean.targets import Target, TargetModule, build_module, get_family, rebuild, register, resolve, targets
from thesean.targets.shared import registry
from thesean.targets.shared.family import Place
from thesean.targets.shared.registry import decided


def test_every_family_has_a_one_line_summary():
    known = targets()
    assert {"gru", "mlp", "conv-2d"} <= known.keys()
    assert all(summary and "\n" not in summary for summary in known.values())


def test_an_unknown_target_names_the_nearest_one():
    with pytest.raises(UnknownNameError, match=r"unknown target 'rn'; did you mean 'rnn'\? known: .*\bgru\b"):
        resolve("rn")


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(TargetMismatchError, match=r"'gru': option 'widht'.*known options: .*width"):
        resolve(Target("gru", widht=3))


def test_something_that_is_no_target_is_refused():
    with pytest.raises(TargetMismatchError, match="expected a target's name or a Target, found int"):
        resolve(3)  # type: ignore[arg-type]


def test_a_scope_is_one_that_all_have_or_the_familys_own():
    for scope in ("mixing", "token-wise", "part"):
        assert resolve(Target("gru", scope=scope)).scope == scope
    assert resolve(Target("copy", scope="members")).scope == "members"
    for target in (
        Target("gru", scope="members"),
        Target("mine", scope="members", build=lambda part: nn.Linear(1, 1)),
    ):
        with pytest.raises(TargetMismatchError, match=r"expected scope='mixing', .* or 'part', found 'members'"):
            resolve(target)


def test_what_a_target_leaves_open_is_decided_by_its_family_where_there_are_places(monkeypatch, sequence_part):
    asked = []

    def decide(places, options):
        asked.append((places, options))
        return {"width": 7} if options.width is None else {}

    monkeypatch.setattr(registry, "_families", dict(registry._families))
    register(dataclasses.replace(get_family("gru"), name="mine", decide=decide))
    places = [Place(facts=sequence_part(), look=lambda: (torch.ones(1), None))]
    given = Target("mine", scope="part", residual=False)
    chosen = decided(given, places)
    assert (chosen.name, chosen.scope, chosen.options) == ("mine", "part", {"residual": False, "width": 7})
    assert asked[0][0] is places
    assert asked[0][1].norm  # as `scope` has it
    wide = Target("mine", width=9)
    own = Target("own", build=lambda part: nn.Linear(1, 1))
    for target, where in ((wide, places), (given, []), (Target("gru"), places), (own, places)):
        assert decided(target, where) is target


def test_a_builder_of_your_own_needs_no_registration(sequence_part):
    target = resolve(Target("mine", build=lambda part: nn.Linear(part.width_in, part.width_out)))
    module = build_module(target, sequence_part(width_out=3))
    assert isinstance(module, nn.Linear)
    assert module.out_features == 3


def test_a_builder_that_returns_no_module_is_refused(sequence_part):
    with pytest.raises(TargetMismatchError, match=r"layers.0: target 'mine' expected .* found NoneType"):
        build_module(Target("mine", build=lambda part: None), sequence_part())  # type: ignore[arg-type, return-value]


def test_every_file_beside_shared_is_a_family_of_its_own_name():
    folder = Path(importlib.import_module("thesean.targets").__file__ or "").parent
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py")} - {"--init--"}
    assert files == set(targets())


def test_a_builder_that_reads_values_is_told_that_a_plan_has_none(monkeypatch, sequence_part):
    """As a stranger's family would: planning builds it on the meta device."""

    class Mine(TargetModule):
        def __init__(self) -> None:
            super().__init__()
            self.gain = float(torch.ones(1))

    gru = get_family("gru")
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    register(dataclasses.replace(gru, name="mine", build=lambda part, options: Mine()))
    assert build("mine", sequence_part()).gain == 1  # with values there is nothing to say
    with pytest.raises(TargetMismatchError) as caught, torch.device("meta"):
        build("mine", sequence_part())
    told = str(caught.value)
    assert told.startswith("layers.0: target 'mine': Family.build(part, options) raised RuntimeError: ")
    assert "meta" in told
    assert told.endswith("where tensors have shapes and no values: read none before `prepare`.")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_whatever_else_a_builder_raises_names_part_and_target(monkeypatch, sequence_part):
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    register(dataclasses.replace(get_family("gru"), name="mine", build=lambda part, options: {}["width"]))
    with pytest.raises(TargetMismatchError, match=r"^layers\.0: target 'mine': .* KeyError: 'width'\. Let `check`"):
        build("mine", sequence_part())
    with pytest.raises(TargetMismatchError, match=r"^layers\.0: target 'own': build\(part\) raised ZeroDivisionError"):
        build_module(Target("own", build=lambda part: 1 / 0), sequence_part())  # type: ignore[arg-type, return-value]


def test_a_registered_family_is_known_and_its_name_is_taken(monkeypatch):
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    family = dataclasses.replace(get_family("gru"), name="test-gru")
    assert register(family) is register(family)
    assert "test-gru" in targets()
    with pytest.raises(TargetMismatchError, match="'test-gru' is already registered"):
        register(dataclasses.replace(family, summary="another"))


def test_a_saved_config_that_does_not_fit_is_an_artifact_error():
    with pytest.raises(ArtifactError, match="'gru': the saved configuration does not fit"):
        rebuild("gru", {"width": 3, "colour": "red"})


def test_the_rule_rnn_has_no_module_of_its_own_to_load():
    with pytest.raises(ArtifactError, match="picks another family"):
        rebuild("rnn", {})


def test_scope_part_makes_a_residual_block_unless_told_otherwise(sequence_part):
    block = build("gru", sequence_part(), scope="part")
    assert block.config()["residual"]
    assert block.config()["norm"]
    plain = build("gru", sequence_part(), scope="part", residual=False)
    assert not plain.config()["residual"]
    assert not build("gru", sequence_part()).config()["residual"]
