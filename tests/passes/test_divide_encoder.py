"""An encoder-decoder in two: what the source alone decides, and what goes step by step.

B batch, T steps of the target, S steps of the source
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import captured, encoder_decoders, models
from tests.encoder_decoders import GUIDES, HEADS, WIDTH, guide
from tests.models import tokens, vectors
from tests.passes.contract import Example
from thesean.errors import PassBroken, PassRefused
from thesean.passes.analyse.chunks import run_in_chunks
from thesean.passes.cache_attention import CacheAttention
from thesean.passes.capture.capture import capture
from thesean.passes.divide_encoder import DivideEncoder
from thesean.passes.graph.halves import HELD, halves_of
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.signature import Bound
from thesean.passes.graph.text import text
from thesean.passes.thread_state import ThreadState, zero_states


class Pooled(nn.Module):
    """source_BSF, target_BT -> logits_BTV: a recurrence that is told what the source is about."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.about, self.head = nn.Embedding(8, 4), nn.Linear(3, 4), nn.Linear(4, 8)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        about_BD = self.about(source).mean(1)
        return self.head(self.words(target) + about_BD.unsqueeze(1))


def pooled() -> captured.Captured:
    return capture(models.seeded(Pooled), {"source": vectors(2, 5, 3), "target": tokens(2, 4) % 8})


def test_the_graph_before_and_after():
    found = pooled()
    before = text(found.graph_module.graph)
    assert before == [
        "source = placeholder source",
        "target = placeholder target",
        "words_weight = get_attr words.weight",
        "about_weight = get_attr about.weight",
        "about_bias = get_attr about.bias",
        "head_weight = get_attr head.weight",
        "head_bias = get_attr head.bias",
        "linear = aten.linear.default(source, about_weight, about_bias)",
        "mean = aten.mean.dim(linear, [1])",
        "embedding = aten.embedding.default(words_weight, target)",
        "unsqueeze = aten.unsqueeze.default(mean, 1)",
        "add = aten.add.Tensor(embedding, unsqueeze)",
        "linear_1 = aten.linear.default(add, head_weight, head_bias)",
        "return linear_1",
    ]
    divided = DivideEncoder(found.signature)(found.graph_module).graph_module
    assert text(found.graph_module.graph) == before
    assert text(divided.graph) == [
        "source = placeholder source",
        "target = placeholder target",
        "encoder = encoder(source)",
        "getitem = getitem(encoder, 0)",
        "decoder = decoder(target, getitem)",
        "getitem_1 = getitem(decoder, 0)",
        "return getitem_1",
    ]
    encoder, decoder, halves = halves_of(divided)
    assert text(encoder.graph) == [
        "source = placeholder source",
        "about_weight = get_attr about.weight",
        "about_bias = get_attr about.bias",
        "linear = aten.linear.default(source, about_weight, about_bias)",
        "mean = aten.mean.dim(linear, [1])",
        "unsqueeze = aten.unsqueeze.default(mean, 1)",
        "return (unsqueeze,)",
    ]
    assert text(decoder.graph) == [
        "target = placeholder target",
        "encoded_0 = placeholder encoded_0",
        "words_weight = get_attr words.weight",
        "head_weight = get_attr head.weight",
        "head_bias = get_attr head.bias",
        "embedding = aten.embedding.default(words_weight, target)",
        "add = aten.add.Tensor(embedding, encoded_0)",
        "linear_1 = aten.linear.default(add, head_weight, head_bias)",
        "return (linear_1,)",
    ]
    assert [s.describe() for s in halves.encoder.inputs] == ["source: float32[batch, time, 3]"]
    assert [s.describe() for s in halves.decoder.inputs] == [
        "target: int64[batch, time]",
        "encoded_0: float32[batch, 1, 4]",
    ]
    assert [s.held for s in halves.decoder.inputs] == [False, True]
    assert (halves.length, halves.leaves) == ("time_1", ((False, 0),))
    assert encoder.get_parameter("about.weight") is found.graph_module.get_parameter("about.weight")


@pytest.mark.parametrize("name", GUIDES)
@torch.no_grad()
def test_halves_are_the_network_at_other_lengths(name):
    found = guide(name)
    divided = DivideEncoder(found.signature)(found.graph_module).graph_module
    for batch, source, target in ((1, 4, 1), (3, 6, 11), (2, 12, 3)):
        inputs = GUIDES[name][1](batch, source, target, seed=5)
        given = {s.name: inputs[s.name] for s in found.signature.inputs}
        wanted, got = leaf_values(found.graph_module(**given)), leaf_values(divided(**given))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bounds_go_with_the_length_that_they_are_of():
    found = guide("plain")
    *_, halves = halves_of(DivideEncoder(found.signature)(found.graph_module).graph_module)
    of_target = Bound(name=halves.length, most=40)
    of_source = Bound(name=next(s for s in found.signature.symbols if s not in ("batch", halves.length)), most=30)
    bounded = replace(found.signature, bounds=(of_source, of_target))
    *_, halves = halves_of(DivideEncoder(bounded)(found.graph_module).graph_module)
    assert halves.encoder.bounds == (of_source,)
    assert halves.decoder.bounds == (replace(of_target, name="time"),)


@pytest.mark.parametrize("name", GUIDES)
def test_keys_and_values_of_each_layer_cross_by_head_and_masks_where_there_are_any(name):
    found = guide(name)
    *_, halves = halves_of(DivideEncoder(found.signature)(found.graph_module).graph_module)
    held = [s for s in halves.decoder.inputs if s.held]
    key, turned = ("batch", HEADS, "source", WIDTH // HEADS), ("batch", HEADS, WIDTH // HEADS, "source")
    wanted = {"plain": [key, turned], "translator": [key] * 4}.get(name, [key] * 2)  # as the products read them
    assert [s.shape for s in held if s.shape[1] == HEADS] == wanted
    masks = [s for s in held if s.shape[1] != HEADS]
    assert len(masks) == (name in ("bart", "translator"))  # one for all layers and heads
    assert all(s.shape == ("batch", 1, 1, "source") for s in masks)
    assert halves.decoder.symbols == ("batch", "time")


def test_heads_that_share_a_dimension_with_the_batch_cross_apart_however_many():
    guide = models.seeded(encoder_decoders.Plain, False, True, 4)
    found = capture(guide, {"source": tokens(2, 6), "target": tokens(2, 4)})
    *_, halves = halves_of(DivideEncoder(found.signature)(found.graph_module).graph_module)
    assert [s.shape for s in halves.decoder.inputs if s.held] == [("batch", 4, "source", 4), ("batch", 4, 4, "source")]


@pytest.mark.parametrize("name", GUIDES)
@torch.no_grad()
def test_the_decoder_takes_a_state_and_chunks(name):
    found = guide(name)
    encoder, decoder, halves = halves_of(DivideEncoder(found.signature)(found.graph_module).graph_module)
    cached = CacheAttention(halves.decoder)(decoder).graph_module
    threaded = ThreadState(halves.decoder)(cached).graph_module
    assert threaded.meta["rows_are_alone"]
    inputs = GUIDES[name][1](3, 8, 10, seed=3)
    whole_BTV = leaf_values(found.graph_module(**{s.name: inputs[s.name] for s in found.signature.inputs}))[0]
    encoded = encoder(**{s.name: inputs[s.name] for s in halves.encoder.inputs})
    given = {s.name: inputs[s.name] for s in halves.decoder.inputs if not s.held}
    given |= dict(zip(halves.crossing, encoded, strict=False))
    for chunks in ((1,) * 10, (1, 5, 4), (10,)):
        pieces, _ = run_in_chunks(threaded, halves.decoder, given, zero_states(threaded, 3), chunks)
        torch.testing.assert_close(torch.cat([p[0] for p in pieces], 1), whole_BTV, rtol=1e-4, atol=1e-4)


class Twins(nn.Module):
    """left_BTF, right_BSF -> how alike they are, (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (self.one(left).mean(1) * self.other(right).mean(1)).sum(-1)


def test_what_has_no_source_or_no_target_is_refused():
    one = captured.gpt2()
    with pytest.raises(PassRefused, match="expected inputs of a decoder, whose length is free, and an encoder's"):
        DivideEncoder(one.signature)(one.graph_module)
    both = capture(models.seeded(Twins), {"left": vectors(2, 5, 3), "right": vectors(2, 4, 3)})
    with pytest.raises(PassRefused, match=r"expected one length along which an output goes .* found none among"):
        DivideEncoder(both.signature)(both.graph_module)


class Scaled(nn.Module):
    """x_BTD, by_BD -> y_BTD: nothing is made of `by` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return self.linear(x * by.unsqueeze(1))


def test_an_input_that_no_weights_meet_alone_has_no_encoder():
    found = capture(models.seeded(Scaled), {"x": vectors(2, 5, 4), "by": vectors(2, 4)})
    with pytest.raises(PassRefused, match="expected an encoder, found no product of weights with by alone"):
        DivideEncoder(found.signature)(found.graph_module)


def test_a_decoder_as_long_as_its_source_has_no_length_of_its_own():
    model = models.seeded(encoder_decoders.Plain, True)
    found = capture(model, encoder_decoders.plain_inputs(2, 6, 6))
    with pytest.raises(PassRefused, match="expected inputs of a decoder, whose length is free"):
        DivideEncoder(found.signature)(found.graph_module)


def test_a_decoder_that_multiplies_its_source_by_weights_is_a_defect():
    found = pooled()
    divide = DivideEncoder(found.signature)
    made = divide(found.graph_module).graph_module
    _, decoder, _ = halves_of(made)
    divide.ensures(made)
    held = next(n for n in decoder.graph.nodes if n.op == "placeholder" and HELD in n.meta)
    weight = next(n for n in decoder.graph.nodes if n.op == "get_attr")
    with decoder.graph.inserting_after(max(held, weight)):
        turned = decoder.graph.call_function(torch.ops.aten.t.default, (weight,))
    with decoder.graph.inserting_after(turned):
        decoder.graph.call_function(torch.ops.aten.matmul.default, (held, turned), name="again")
    with pytest.raises(PassBroken, match="no product of weights with the source in the decoder, such as again"):
        divide.ensures(made)


def example() -> Example:
    found = pooled()
    return Example(
        DivideEncoder(found.signature), found.graph_module, (vectors(3, 6, 3, seed=1), tokens(3, 7, seed=2) % 8)
    )


@pytest.mark.parametrize("training", [True, False])
def test_halves_train_where_the_whole_does(training):
    found = pooled()
    found.graph_module.train(training)
    encoder, decoder, _ = halves_of(DivideEncoder(found.signature)(found.graph_module).graph_module)
    assert encoder.training == decoder.training == training
