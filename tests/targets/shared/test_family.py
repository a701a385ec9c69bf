from __future__ import annotations

from typing import Any

import pytest

from thesean.errors import TargetMismatchError
from thesean.targets import Target, get_family
from thesean.targets.shared.family import parse_options


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (Target("gru"), "gru"),
        (Target("gru", width=3), "gru(width=3)"),
        (Target("gru", scope="part"), "gru(scope=part)"),
        (Target("gru", scope="part", width=3, norm=True), "gru(scope=part, width=3, norm=True)"),
    ],
)
def test_a_target_is_written_as_it_was_asked_for(target, told):
    assert str(target) == told


@pytest.mark.parametrize("name", [3, None, ["gru"]])
def test_a_name_is_a_word(name: Any):
    with pytest.raises(TargetMismatchError, match="is named by its family, or by a name of yours; found"):
        Target(name)


def test_an_option_that_does_not_fit_is_told_by_its_place_beside_those_that_there_are():
    family = get_family("mixer")
    known = ", ".join(family.options.model_fields)
    with pytest.raises(TargetMismatchError, match=rf"option 'colour'.*known options: {known}\.?$"):
        parse_options(family, {"colour": "red"})
    with pytest.raises(TargetMismatchError, match="known options: none"):
        parse_options(get_family("copy"), {"colour": "red"})
    with pytest.raises(TargetMismatchError, match=r"'conv-1d': option 'dilations\.1'"):
        parse_options(get_family("conv-1d"), {"dilations": [1, "far"]})
