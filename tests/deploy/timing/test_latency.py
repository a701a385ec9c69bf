"""Figures stand where the files run, and say how a token was made.

B batch, T time
"""

from __future__ import annotations

import itertools

import pytest

from tests import models
from thesean.deploy.export import export
from thesean.deploy.timing.latency import benchmark, latency_of_models, measure
from thesean.passes.bound_positions import BoundPositions


def test_calls_take_turns_and_percentiles_are_in_order():
    turns: list[str] = []
    found = measure({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=6)
    order = [turns[0], *(b for a, b in itertools.pairwise(turns) if a != b)]
    assert order == ["a", "b"] * 7  # the warm-up and six turns
    for latency in found.values():
        assert latency.repeats == 6
        assert 0 <= latency.p20_ms <= latency.median_ms <= latency.p80_ms


def test_time_that_is_over_leaves_five_repeats():
    assert measure({"a": lambda: None}, repeats=50, seconds=0)["a"].repeats == 5


def test_a_file_with_state_steps_and_one_without_recomputes_as_far_as_its_table_goes(convert, tmp_path):
    module, captured = convert(models.gpt2(), {"input_ids": models.tokens()}, "mingru")
    assert BoundPositions()(module).modified
    guide = export(captured.graph_module, captured.signature, tmp_path / "guide.onnx", stateful=False).path
    converted = export(module, captured.signature, tmp_path / "converted.onnx").path
    found = latency_of_models({"guide": guide, "rnn": converted}, captured.signature, contexts=(16, 128), repeats=5)
    assert (found["guide"].token_kind, found["rnn"].token_kind) == ("recompute", "state")
    assert found["guide"].prefill[128] is None  # its table has 64 rows
    assert found["guide"].token[128] is None
    assert found["guide"].token[16] == found["guide"].prefill[16]
    assert set(found["rnn"].medians_ms()) == {"prefill_16", "prefill_128", "token_16", "token_128"}
    rnn = found["rnn"]
    assert rnn.prefill[128].median_ms > rnn.token[128].median_ms > 0


def test_a_network_without_time_has_one_figure(convert):
    module, captured = convert(models.resnet(), {"image": models.vectors(2, 1, 8, 8)}, "mlp")
    found = benchmark(module, captured.signature, repeats=5)
    assert list(found) == ["forward"]
    assert found["forward"] > 0


@pytest.mark.slow
def test_an_encoder_has_prefill_figures_alone(convert):
    module, captured = convert(models.bert(), {"input_ids": models.tokens()}, "gru")
    assert set(benchmark(module, captured.signature, contexts=(8, 16), repeats=5)) == {"prefill_8", "prefill_16"}
