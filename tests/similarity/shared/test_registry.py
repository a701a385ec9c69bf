"""Names, flattening, options, and the module that is also the function."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean.similarity
from thesean.errors import DataError, UnknownNameError
from thesean.similarity import Measure, MeasureError, get_measure, measures, register, similarity
from thesean.similarity.shared import registry


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_file_that_defines_a_measure_is_registered_and_no_other():
    (folder,) = importlib.import_module("thesean.similarity").__path__
    defining = 0
    for path in Path(folder).glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            defining += any(isinstance(target, ast.Name) and target.id == "MEASURE" for target in targets)
    assert len(measures()) == defining
    assert {"cka", "cka-debiased", "mse", "rbf-cka"} <= set(measures())
    assert measures() == sorted(measures())
    assert all(get_measure(name).name == name for name in measures())


def test_the_subpackage_is_the_function_too():
    x_NP, y_NQ = features(8, 3), features(8, 5, seed=1)
    expected = similarity(x_NP, y_NQ, measure="cka")
    module: Any = importlib.import_module("thesean.similarity")
    assert torch.equal(module(x_NP, y_NQ, measure="cka"), expected)
    assert torch.equal(module.similarity(x_NP, y_NQ), expected)
    assert torch.equal(thesean.similarity(x_NP, y_NQ, measure="cka"), expected)


def test_an_unknown_measure_gets_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"unknown measure 'ckaa'; did you mean 'cka'. known: cka, cka-deb"):
        similarity(features(8, 3), features(8, 3), "ckaa")


def test_a_registered_measure_is_known_by_name_and_its_name_is_taken(monkeypatch):
    measures()  # the built-in ones are found before the copy is made
    monkeypatch.setattr(registry, "_measures", dict(registry._measures))
    mine = Measure(name="mine", summary="largest distance", value=lambda x, y: (x - y).abs().max())
    assert register(mine) is register(mine)
    x_NP, y_NP = features(4, 3), features(4, 3, seed=1)
    assert torch.equal(similarity(x_NP, y_NP, "mine"), (x_NP - y_NP).abs().max())
    with pytest.raises(MeasureError, match="measure 'mine' is already registered"):
        register(Measure(name="mine", summary="another", value=lambda x, y: (x - y).abs().sum()))
    with pytest.raises(MeasureError, match="expected a Measure, found features"):
        register(features)  # type: ignore[arg-type]


def test_an_option_that_the_measure_does_not_have_is_named():
    with pytest.raises(TypeError, match="measure 'mse' has no option 'backend'; its options: none"):
        similarity(features(8, 3), features(8, 3), "mse", backend="torch")
    x_NP, y_NP = features(8, 3), features(8, 3, seed=1)
    assert torch.equal(similarity(x_NP, y_NP, backend="torch"), similarity(x_NP, y_NP))


def test_a_measure_of_ones_own_needs_no_registration():
    mine = Measure(
        name="mine", summary="largest distance", value=lambda x, y: (x - y).abs().max(), loss=lambda x, y: (x - y).sum()
    )
    x_NP = features(4, 3)
    assert similarity(x_NP, x_NP + 2, mine).item() == pytest.approx(2.0)
    assert "mine" not in measures()


def test_examples_or_tokens_are_the_rows():
    x_BTD, y_BTE = features(6, 5, 4), features(6, 5, 3, seed=1)
    assert torch.equal(similarity(x_BTD, y_BTE), similarity(x_BTD.reshape(6, 20), y_BTE.reshape(6, 15)))
    by_token = similarity(x_BTD, y_BTE, flatten="token")
    assert torch.equal(by_token, similarity(x_BTD.reshape(30, 4), y_BTE.reshape(30, 3)))
    assert by_token != similarity(x_BTD, y_BTE)


def test_a_feature_map_compares_with_a_vector_of_the_same_examples():
    assert 0 < similarity(features(8, 3, 4, 4), features(8, 10, seed=1)).item() < 1


def test_an_unknown_way_to_flatten_and_a_lone_vector_are_refused():
    with pytest.raises(UnknownNameError, match="unknown flatten 'tokens'; did you mean 'token'"):
        similarity(features(8, 3, 2), features(8, 3, 2), flatten="tokens")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"expected x of \(examples, ..., width\), found shape \(8,\)"):
        similarity(features(8), features(8))
