from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.targets.build import build
from tests.tolerances import relative_error
from thesean.distill.closed_form import solve_alone
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import PartFacts, rebuild
from thesean.targets.mlp import MLP
from thesean.targets.shared.directions import directions


def part_of(input_shape, output_shape, mixing="none") -> PartFacts:
    return PartFacts(path="layer3.1", input_shape=input_shape, output_shape=output_shape, mixing=mixing, params=1)


FEATURE_MAP = part_of(("batch", 4, 6, 6), ("batch", 8, 3, 3))
VECTOR = part_of(("batch", 20), ("batch", 7))
TOKENS = part_of(("batch", "time", 16), ("batch", "time", 5))
STATIC_MIXER = part_of(("batch", 9, 16), ("batch", 9, 16), "bidirectional")
ALL = pytest.mark.parametrize(
    ("part", "sizes"),
    [(FEATURE_MAP, (4, 6, 6)), (VECTOR, (20,)), (TOKENS, (11, 16)), (STATIC_MIXER, (9, 16))],
    ids=["feature map", "vector", "tokens", "static sequence"],
)


@ALL
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"activation": "relu", "residual": True, "norm": True}])
def test_output_has_the_parts_shape_and_the_config_round_trips(part, sizes, options):
    module = build("mlp", part, **options).eval()
    x = torch.randn(3, *sizes)
    y = module(x)
    assert y.shape[2:] == torch.Size([d for d in part.output_shape[2:] if isinstance(d, int)])
    assert not module.stateful
    again = rebuild("mlp", json.loads(json.dumps(module.config()))).eval()
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)


@ALL
def test_loss_falls_on_a_toy_part(part, sizes):
    x = torch.randn(32, *sizes)
    module = build("mlp", part)
    with torch.no_grad():
        wanted = torch.tanh(build("mlp", part)(x) * 50)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (module(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


def test_hidden_width_when_flattening_is_the_smaller_side_between_32_and_128():
    assert build("mlp", FEATURE_MAP).width == 72
    assert build("mlp", VECTOR).width == 32
    wide = part_of(("batch", 64, 8, 8), ("batch", 64, 8, 8))
    assert build("mlp", wide).width == 128
    assert build("mlp", wide, width=9).width == 9


def test_a_token_wise_module_is_four_times_as_wide_and_blind_to_other_tokens():
    module = build("mlp", TOKENS).eval()
    assert module.width == 64
    x_BTD = torch.randn(2, 6, 16)
    torch.testing.assert_close(module(x_BTD)[:, 3:4], module(x_BTD[:, 3:4]))


@pytest.mark.parametrize(("activation", "act"), [("gelu", nn.GELU()), ("relu", nn.ReLU())])
def test_the_hidden_layer_is_normed_where_the_part_is_flattened_and_asked_otherwise(activation, act):
    cases: list[tuple[PartFacts, tuple[int, ...], dict[str, Any], nn.Module]] = [
        (VECTOR, (20,), {"hidden_norm": "layer"}, nn.LayerNorm(32)),
        (VECTOR, (20,), {"hidden_norm": "none"}, nn.Identity()),
        (TOKENS, (11, 16), {}, nn.Identity()),
        (TOKENS, (11, 16), {"hidden_norm": "layer"}, nn.LayerNorm(64)),
    ]
    for part, sizes, given, norm in cases:
        x, module = torch.randn(3, *sizes), build("mlp", part, activation=activation, **given)
        torch.testing.assert_close(module(x), module.last(act(norm(module.first[0](x)))))


def test_a_whole_block_of_tokens_brings_stream_and_norm_and_nothing_else_does():
    def brings(mixing, **options: Any) -> tuple[bool, bool]:
        part = part_of(("batch", 9, 16), ("batch", 9, 16), mixing)
        module = build("mlp", part, **options)
        return module.skip(torch.zeros(2, 9, 16)) is not None, module.norm is not None

    assert brings("bidirectional", tokens="each") == brings("causal", tokens="each") == (True, True)
    assert brings("bidirectional", tokens="each", residual=False, norm=False) == (False, False)
    assert brings("none", tokens="each") == brings("none") == brings("bidirectional") == (False, False)
    assert brings("none", residual=True) == (True, False)
    assert brings("none", norm=True) == (False, True)


def test_rank_narrows_the_first_layer():
    def first_layer(module: Any) -> int:
        return sum(p.numel() for p in module.first.parameters() if p.ndim == 2)

    assert first_layer(build("mlp", FEATURE_MAP)) == 144 * 72
    assert first_layer(build("mlp", FEATURE_MAP, rank=2)) == 2 * (144 + 72)


def test_running_statistics_only_where_the_part_is_flattened():
    _, layer, batch, _ = build("mlp", FEATURE_MAP).first
    assert isinstance(layer, nn.LayerNorm)
    assert isinstance(batch, nn.BatchNorm1d)
    assert not list(build("mlp", FEATURE_MAP, hidden_norm="layer").buffers())
    assert not list(build("mlp", TOKENS).buffers())


def test_what_the_norm_by_the_batch_reads_begins_with_mean_zero_and_variance_one():
    x_BCHW = 5 + 3 * torch.randn(640, 4, 6, 6)
    module = build("mlp", FEATURE_MAP)
    assert isinstance(module, MLP)
    wanted = module.shape(torch.tanh(x_BCHW.flatten(1)[:, : module.last.out_features]))
    module.prepare(FEATURE_MAP, list(zip(x_BCHW.split(320), wanted.split(320), strict=True)))
    layer_NE = module.first[1](module.first[0](x_BCHW.flatten(1)))
    torch.testing.assert_close(layer_NE.mean(0), torch.zeros(module.width), rtol=0, atol=0.1)
    torch.testing.assert_close(layer_NE.var(0), torch.ones(module.width), rtol=0.1, atol=0)


def test_one_row_of_a_batch_has_no_statistics_of_its_own():
    module = build("mlp", VECTOR)
    one = torch.randn(1, 20)
    torch.testing.assert_close(module.train()(one), module.eval()(one))


def test_skip_is_the_input_where_shapes_agree():
    x = torch.randn(2, 9, 16)
    module = build("mlp", STATIC_MIXER, residual=True).eval()
    features, _ = module.features(x)
    torch.testing.assert_close(module(x), module.shape(module.last(features)) + x)
    assert build("mlp", FEATURE_MAP, residual=True).skip(torch.randn(2, 4, 6, 6)) is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (part_of(("batch", "time", 16), ("batch", "time", 16), "bidirectional"), "unbounded sequence: choose.*'rnn'"),
        (part_of(("batch", 9, 16), ("batch", 9, 16), "causal"), "would read the future. Choose target 'rnn'"),
        (part_of(("batch", 3, "height", "width"), ("batch", 3, 4, 4)), "expected static dimensions"),
        (part_of(("batch", "time", 16), ("batch", "half", 16)), "expected as many tokens out as in"),
        (part_of(("batch",), ("batch", 3)), "expected a batch and at least one more dimension"),
    ],
)
def test_a_part_that_no_mlp_can_replace_is_refused(part, message):
    with pytest.raises(TargetMismatchError, match=rf"^layer3\.1: target 'mlp' .*{message}"):
        build("mlp", part)


def test_batch_norm_over_tokens_is_refused():
    with pytest.raises(TargetMismatchError, match="Leave hidden_norm out"):
        build("mlp", TOKENS, hidden_norm="batch")


def test_flops_count_rows_of_the_flattened_part_and_tokens_of_a_sequence():
    flat = build("mlp", STATIC_MIXER, width=10)
    assert flat.flops(STATIC_MIXER, {"batch": 3}) == 2 * 3 * (144 * 10 + 10 * 144)
    tokens = build("mlp", TOKENS, width=10)
    assert tokens.flops(TOKENS, {"batch": 3, "time": 7}) == 2 * 21 * (16 * 10 + 10 * 5)


def test_a_linear_part_is_met_by_directions_of_both_signs():
    torch.manual_seed(0)
    linear_IO = torch.randn(20, 3) @ torch.randn(3, 7)
    inputs = [torch.randn(40, 20) + 2 for _ in range(4)]
    examples = [(x, x @ linear_IO + 1) for x in inputs]
    module = build("mlp", VECTOR, width=12, activation="relu", hidden_norm="none")
    assert isinstance(module, MLP)
    module.prepare(VECTOR, examples)
    up_NE = module.features(torch.cat(inputs))[0]
    torch.testing.assert_close((up_NE[:, :3] - up_NE[:, 3:6]).var(0), torch.ones(3), rtol=0.02, atol=0)
    assert solve_alone(module, examples, ridge=1e-6, where="a test")
    for x, y in examples:
        assert relative_error(module(x), y) < 0.02
    random = build("mlp", VECTOR, width=12, activation="relu", hidden_norm="none")
    assert solve_alone(random, examples, ridge=1e-6, where="a test")
    assert relative_error(random(inputs[0]), examples[0][1]) > 0.2


def test_directions_are_the_same_in_both_forms_of_the_regression(monkeypatch):
    torch.manual_seed(0)
    x_NI = torch.randn(32, 12)
    examples = [(x_NI, torch.tanh(x_NI @ torch.randn(12, 5)))]
    weight_KI, bias_K = directions(examples, 4, "a part")
    repeated = [(torch.cat([x_NI, torch.zeros(32, 40)], 1), examples[0][1])]  # more inputs than examples
    penalty = 52 / 12  # relative to the mean variance of the inputs, of which there are more
    monkeypatch.setattr("thesean.targets.shared.directions._RIDGE", 1e-2 * penalty)
    again_KI, again_K = directions(repeated, 4, "a part")
    signs_K1 = torch.sign((weight_KI * again_KI[:, :12]).sum(1, keepdim=True))
    torch.testing.assert_close(again_KI[:, :12] * signs_K1, weight_KI, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(again_K * signs_K1[:, 0], bias_K, rtol=1e-6, atol=1e-8)


def test_a_direction_takes_eight_examples_and_what_is_left_of_the_width_stays_random():
    torch.manual_seed(0)
    module = build("mlp", VECTOR, width=8)
    before = module.first[0].weight.clone()
    module.prepare(VECTOR, [(torch.randn(9, 20), torch.randn(9, 7)), (torch.randn(9, 20), torch.randn(9, 7))])
    after = module.first[0].weight
    torch.testing.assert_close(after[2:4], -after[:2])
    assert not torch.equal(after[:4], before[:4])
    assert torch.equal(after[4:], before[4:])


def test_too_few_examples_leave_the_layer_as_it_is():
    module = build("mlp", VECTOR, width=8)
    before = module.first[0].weight.clone()
    module.prepare(VECTOR, [(torch.randn(7, 20), torch.randn(7, 7))])
    assert torch.equal(module.first[0].weight, before)


def test_activations_that_are_not_finite_choose_no_features():
    with pytest.raises(NumericalError, match=r"layer3\.1: can't choose features"):
        build("mlp", VECTOR).prepare(VECTOR, [(torch.randn(4, 20), torch.full((4, 7), torch.nan))])


def test_directions_of_what_dies_out_stay_bounded():
    """A hybrid's activations don't die out with the guide's, and no weight may make infinities of them."""
    x_NI = 1e-33 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    weight_KI, _ = directions([(x_NI, x_NI @ torch.ones(6, 3))], 3, "a part")
    assert weight_KI.abs().max() < 1e4
