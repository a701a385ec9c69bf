from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from thesean.targets.shared.describe_options import Option, describe_options, type_name
from thesean.targets.shared.family import Options


def test_an_option_is_told_with_its_type_default_and_bounds():
    class Some(Options):
        window: int | None = Field(default=None, gt=0, description="last tokens")
        share: float = Field(default=0.5, gt=0, le=1)
        memory: tuple[float, float] = (1 / 3, 64.0)

    assert describe_options(Some) == [
        Option("window", "int | None", "None", "last tokens; above 0"),
        Option("share", "float", "0.5", "above 0 and at most 1"),
        Option("memory", "tuple[float, float]", "(0.3333, 64)", ""),
    ]


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Literal["gelu", "relu"], '"gelu" | "relu"'),
        (tuple[int, ...] | None, "tuple[int, ...] | None"),
        (tuple[Annotated[float, Field(gt=0)], float], "tuple[float, float]"),
    ],
)
def test_types_are_named_without_modules_and_bounds(annotation: object, text: str):
    assert type_name(annotation) == text
