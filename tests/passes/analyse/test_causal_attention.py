"""B batch, T time"""

from __future__ import annotations

import pytest
import torch

from tests import captured
from tests.causal_guides import WINDOW, attending, family
from thesean.errors import PassRefused
from thesean.passes.analyse.attention_cores import CausalAttention
from thesean.passes.analyse.causal_attention import causal_attentions
from thesean.passes.capture.captured import Captured


def found(guide: Captured) -> list[CausalAttention]:
    return causal_attentions(guide.graph_module, guide.signature)


@pytest.mark.parametrize("spelling", ["fused", "grouped", "stored", "packed", "single", "bent", "windowed"])
def test_it_is_found_however_it_is_written(spelling):
    (core,) = found(attending(spelling))
    assert core.window == (3 if spelling == "windowed" else None)
    assert core.cap == (3.0 if spelling == "bent" else None)
    assert core.packed == {"packed": 2, "single": 1}.get(spelling, 0)
    scale = {"packed": 1.0, "single": 1 / 4, "bent": 1 / 2}.get(spelling, 8**-0.5)
    assert core.scale == pytest.approx(scale)
    assert core.padding is None


@pytest.mark.parametrize("window", [1, 2, 20, 100])
def test_a_window_is_read_at_any_size(window):
    """Longer ones than the length that the graph is recorded at, too."""
    (core,) = found(attending("windowed", window))
    assert core.window == window


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("mistral", [WINDOW, WINDOW]),
        ("gpt_neo", [None, WINDOW]),
        ("gemma2", [WINDOW, None]),
        ("gemma3", [WINDOW, None]),
        ("qwen3", [None, None]),
    ],
)
def test_windows_are_read_off_each_layers_mask(name, windows):
    assert [core.window for core in found(family(name))] == windows


def test_keys_and_values_are_those_before_their_heads_were_repeated():
    guide = captured.llama()
    for core in found(guide):
        assert core.key.meta["val"].shape[1] == core.value.meta["val"].shape[1] == 2
        assert core.query.meta["val"].shape[1] == 4


@pytest.mark.parametrize(("spelling", "heads"), [("stored", 2), ("repeated", 1)])
def test_keys_are_those_before_they_were_turned_for_the_product_too(spelling, heads):
    (core,) = found(attending(spelling))
    assert not core.turned
    shapes = [tuple(n.meta["val"].shape) for n in (core.key, core.value)]
    assert [(s[1], s[3]) for s in shapes] == [(heads, 8)] * 2


@pytest.mark.parametrize("attention", captured.KERNELS)
def test_the_guides_mask_of_padded_steps_is_found_beside_the_causal_one(attention):
    guide = family("gpt2", attention, masked=True)
    first, second = found(guide)
    assert first.padding == second.padding
    assert first.padding is not None
    assert first.padding.rule in ("one", "true")
    node = next(n for n in guide.graph_module.graph.nodes if n.name == first.padding.node)
    mask_BT = torch.tensor([[0, 1]])
    assert first.padding.seen(mask_BT.to(node.meta["val"].dtype)).tolist() == [[False, True]]


def test_what_looks_ahead_is_none():
    assert found(attending("ahead")) == []
    assert found(attending("sunk")) == []  # and what is read as none: where the whole is run, its part is told of
    assert found(captured.bert()) == []


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ("strided", r"expected queries that see all earlier keys, or the last ones, found a mask of another pattern"),
        ("clamped", r"expected softmax\(scale q k' \+ mask\) v, found an attention that it does not reproduce"),
    ],
)
def test_a_causal_one_that_no_cache_stands_for_is_refused(spelling, reason):
    with pytest.raises(PassRefused, match=reason):
        found(attending(spelling))


def test_a_bias_of_the_distance_is_read_with_its_slopes():
    (core,) = found(attending("leaning"))
    assert core.distance is not None
    torch.testing.assert_close(core.distance.slope_H, torch.tensor([-0.5, -0.125]))
    (core,) = found(attending("tabled"))
    assert core.distance is not None
    assert core.distance.table_HD.shape == (2, 8)
    assert not core.distance.slope_H.any()


def test_distances_of_tokens_are_told_from_those_of_steps():
    assert [core.counted for core in found(family("bloom", masked=True))] == [True, True]  # counted from the mask
    assert [core.counted for core in found(family("bloom"))] == [False, False]


def test_a_bias_of_more_than_the_distance_is_refused_by_the_attentions_path():
    with pytest.raises(PassRefused, match=r"expected scores to which a mask is added, or a bias of the distance of"):
        found(attending("placed"))
