"""Which token comes next, against the formulas and against transformers' own processors.

B batch, V vocabulary
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thesean.deploy.sampling import Sampling, likeliest, nucleus
from thesean.errors import DataError, NumericalError

LOGITS_V = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_without_settings_the_likeliest_token_is_taken():
    assert [Sampling().choose(np.roll(LOGITS_V, k), None, random()) for k in range(5)] == list(range(5))
    assert Sampling().probabilities(LOGITS_V).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.3}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.71}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [4 / 7, 3 / 7, 0, 0, 0]),  # of what top_k leaves, 0.82 are the first two
        ({"temperature": 0.5}, np.array([16, 9, 2.25, 1, 0.25]) / 28.5),
        ({"temperature": 1e-320}, [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_probabilities_worked_by_hand(settings, expected):
    found_V = Sampling(**{"temperature": 1.0, **settings}).probabilities(LOGITS_V)
    np.testing.assert_allclose(found_V, expected, rtol=1e-6, atol=1e-12)


def test_what_is_as_likely_as_the_last_of_the_likeliest_stays_too():
    assert Sampling(temperature=1, top_k=2).probabilities(np.array([0.0, 1.0, 1.0, 1.0])).tolist() == [0, *[1 / 3] * 3]


def test_what_was_read_is_made_less_likely_by_the_penalty():
    """Keskar et al. 2019: a positive logit is divided, a negative one multiplied."""
    logits_V = np.array([2.0, 1.5, -1.0, -1.5])
    read_V = np.array([True, False, True, False])
    wanted = np.exp([1.0, 1.5, -2.0, -1.5])
    found_V = Sampling(temperature=1, repetition_penalty=2.0).probabilities(logits_V, read_V)
    np.testing.assert_allclose(found_V, wanted / wanted.sum())
    assert Sampling(repetition_penalty=2.0).choose(logits_V, read_V, random()) == 1
    assert logits_V.tolist() == [2.0, 1.5, -1.0, -1.5]


def test_drawn_tokens_come_as_often_as_they_are_likely():
    sampling, drawing, count = Sampling(temperature=0.7, top_p=0.9), random(), 20_000
    expected_V = sampling.probabilities(LOGITS_V)
    tokens = [sampling.choose(LOGITS_V, None, drawing) for _ in range(count)]
    found_V = np.bincount(tokens, minlength=5) / count
    assert (expected_V == 0).any()
    assert not found_V[expected_V == 0].any()
    # four standard deviations
    assert (np.abs(found_V - expected_V) <= 4 * np.sqrt(expected_V * (1 - expected_V) / count)).all()


@pytest.mark.parametrize("size", [3, 100, 5000])
@pytest.mark.parametrize("digits", [0, 9])  # many that are equal, none
def test_the_likeliest_of_many_are_found_without_sorting_all(size, digits):
    x_V = np.round(np.random.default_rng(size).standard_normal(size), digits)
    for count in (1, 2, 40, 90):
        expected = np.flatnonzero(x_V >= np.sort(x_V)[-min(count, size)])
        np.testing.assert_array_equal(likeliest(x_V, count), expected)
    for scale in (0.01, 1.0, 5.0):  # nearly all tokens are needed, some, one
        p_V = np.exp(scale * x_V) / np.exp(scale * x_V).sum()
        order = np.argsort(-p_V, kind="stable")
        expected = np.sort(order[p_V[order].cumsum() - p_V[order] < 0.9])
        np.testing.assert_array_equal(nucleus(p_V, 0.9), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_probabilities_are_those_of_transformers(settings):
    transformers = pytest.importorskip("transformers")
    logits_BV = np.random.default_rng(1).normal(scale=3, size=(4, 50)).astype(np.float32)
    ids_BT = torch.from_numpy(np.random.default_rng(2).integers(0, 50, (4, 9)))
    makers = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores_BV = torch.from_numpy(logits_BV.copy())
    for name, maker in makers.items():  # in the order in which transformers applies them
        if name in settings:
            scores_BV = maker(settings[name])(ids_BT, scores_BV)
    expected_BV = scores_BV.softmax(-1).numpy()
    for logits_V, ids_T, expected_V in zip(logits_BV, ids_BT.numpy(), expected_BV, strict=True):
        read_V = np.isin(np.arange(50), ids_T)
        found_V = Sampling(**settings).probabilities(logits_V, read_V)
        assert ((found_V > 0) == (expected_V > 0)).all()
        np.testing.assert_allclose(found_V, expected_V, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a number of at least 0, found -1.0"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": "hot"}, "temperature: expected"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected a whole number of at least 1, found 0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: expected"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected a number above 0 and up to 1"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p: expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"top_k": 5}, "top_k, top_p and min_p need a temperature"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}], ids=str)
def test_nothing_is_chosen_from_what_is_no_number(settings):
    with pytest.raises(NumericalError, match="logits"):
        Sampling(**settings).choose(np.full(5, np.nan), None, random())
