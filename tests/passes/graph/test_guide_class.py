"""What is kept of a guide's class and its configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from thesean.passes.graph.guide_class import GuideClass


class Settings:
    def __init__(self, text: Any) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Settings({self.text!r})"

    def to_json_string(self, use_diff: bool = True) -> Any:
        assert not use_diff  # defaults change from one version to another
        if isinstance(self.text, Exception):
            raise self.text
        return self.text


class Configured(nn.Module):
    def __init__(self, config: Any, generation: Any = None) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation


def test_class_and_settings_are_kept_as_data():
    config = {"width": 4, "_name_or_path": "/home/me", "tied": False}
    generation = {"eos_token_id": 2, "do_sample": False, "use_cache": False, "top_k": None, "_from": 1}
    model = Configured(Settings(json.dumps(config)), Settings(json.dumps(generation)))
    found = GuideClass.of(model)
    assert found is not None
    assert found.path.endswith("test_guide_class.Configured")
    assert found.record is Configured
    assert found.config == {"width": 4, "tied": False}
    assert found.generation == {"eos_token_id": 2, "use_cache": False}
    assert found.to_json() == {"path": found.path, "config": found.config, "generation": found.generation}


@pytest.mark.parametrize("generation", [None, Settings("{}"), Settings("[]"), Settings("no JSON")])
def test_a_model_that_generates_nothing_has_no_settings_for_it(generation):
    found = GuideClass.of(Configured(Settings('{"width": 4}'), generation))
    assert found is not None
    assert found.generation is None
    assert found.to_json() == {"path": found.path, "config": {"width": 4}}


@pytest.mark.parametrize(
    "config", [None, {"width": 4}, Settings("[1]"), Settings("no JSON"), Settings(ValueError("no"))], ids=repr
)
def test_a_configuration_that_does_not_say_itself_as_data_is_none(config):
    assert GuideClass.of(Configured(config)) is None
    assert GuideClass.of(nn.Linear(2, 2)) is None
