from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from tests.targets.build import build
from thesean.errors import ArtifactError, TargetMismatchError, UnknownNameError
from thesean.targets import Target, build_module, get_family, rebuild, register, resolve, targets

FAMILIES = {
    "conv", "conv-1d", "delta", "elman", "gru", "identity", "linear", "linear-attention", "lstm", "mingru", "mixer",
    "mlp", "reservoir", "rnn", "ssm",
}  # fmt: skip
MAPS = {"conv", "conv-2d", "resnet-block"}  # feature maps: see test_spatial


def test_every_family_has_a_one_line_summary():
    known = targets()
    assert known.keys() >= FAMILIES | MAPS
    assert all(summary and "\n" not in summary for summary in known.values())


def test_an_unknown_target_names_the_nearest_one():
    with pytest.raises(UnknownNameError, match=r"unknown target 'rn'; did you mean 'rnn'\? known: .*elman, gru"):
        resolve("rn")


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(TargetMismatchError, match=r"'gru': option 'widht'.*known options: .*width"):
        resolve(Target("gru", widht=3))


def test_something_that_is_no_target_is_refused():
    with pytest.raises(TargetMismatchError, match="expected a target's name or a Target, found int"):
        resolve(3)  # type: ignore[arg-type]


def test_a_builder_of_your_own_needs_no_registration(sequence_part):
    target = resolve(Target("mine", build=lambda part: nn.Linear(part.width_in, part.width_out)))
    module = build_module(target, sequence_part(width_out=3))
    assert isinstance(module, nn.Linear)
    assert module.out_features == 3


def test_a_builder_that_returns_no_module_is_refused(sequence_part):
    with pytest.raises(TargetMismatchError, match=r"layers.0: target 'mine' expected .* found NoneType"):
        build_module(Target("mine", build=lambda part: None), sequence_part())  # type: ignore[arg-type, return-value]


def test_a_registered_family_is_known_and_its_name_is_taken():
    family = dataclasses.replace(get_family("gru"), name="test-gru")
    assert register(family) is register(family)
    assert "test-gru" in targets()
    with pytest.raises(TargetMismatchError, match="'test-gru' is already registered"):
        register(dataclasses.replace(family, summary="another"))


@pytest.mark.parametrize(
    ("name", "mixing"),
    # an mlp is no causal mixer, see test_mlp
    [(n, m) for n in sorted(FAMILIES) for m in ("none", "causal", "bidirectional") if (n, m) != ("mlp", "causal")],
)
def test_a_module_is_rebuilt_from_its_json_config(name, mixing, sequence_part):
    part = sequence_part(mixing, time=6)
    module = build(name, part)
    again = rebuild(module.family, json.loads(json.dumps(module.config())))
    again.load_state_dict(module.state_dict())
    x_BTD = torch.randn(2, 6, 16)
    first, second = module.eval()(x_BTD), again.eval()(x_BTD)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


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
