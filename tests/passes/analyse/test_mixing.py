"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured
from tests.captured import KERNELS
from tests.models import vectors
from thesean.errors import PlanError
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.layout import is_channels_first
from thesean.passes.analyse.mixing import probe_mixing
from thesean.passes.analyse.regions import module_regions
from thesean.passes.capture.capture import capture
from thesean.passes.graph.record import record
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition
from thesean.targets import Target


def mixing(guide, granularity="block", time=11):
    values = captured.recorded(guide, time)
    return {p.path: probe_mixing(p.region, values) for p in partition(captured.flow_of(guide), granularity)}


@pytest.mark.parametrize("guide", [captured.gpt2, captured.llama, captured.token_mixer])
def test_blocks_of_language_models_are_causal(guide):
    assert set(mixing(guide()).values()) == {"causal"}


@pytest.mark.parametrize("guide", [captured.bert, captured.encoder])
def test_blocks_of_encoders_look_both_ways(guide):
    assert set(mixing(guide()).values()) == {"bidirectional"}


@pytest.mark.parametrize("attention", KERNELS)
def test_mlps_of_a_transformer_are_token_wise(attention):
    found = mixing(captured.gpt2(attention=attention), "sublayer")
    assert {path: m for path, m in found.items() if path.endswith("mlp")} == {
        "transformer.h.0.mlp": "none",
        "transformer.h.1.mlp": "none",
    }
    assert {m for path, m in found.items() if path.endswith("attn")} == {"causal"}


def test_norms_are_token_wise():
    guide = captured.gpt2()
    norm = module_regions(captured.flow_of(guide))["transformer.h.1.ln_1"]
    assert probe_mixing(norm, captured.recorded(guide)) == "none"


def test_feature_maps_have_no_direction_and_vectors_no_tokens():
    assert set(mixing(captured.resnet()).values()) == {"bidirectional"}
    assert set(mixing(captured.mlp()).values()) == {"none"}


def test_three_tokens_are_enough():
    assert set(mixing(captured.gpt2(), time=3).values()) == {"causal"}


class Convolutions(nn.Module):
    """Residual convolutions over (batch, channels, time), or over (batch, time, width) turned round inside."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + (layer(x.transpose(1, 2)).transpose(1, 2) if self.turned else layer(x))
        return x


def test_one_row_shows_mixing_as_two_do():
    for causal, found in ((True, "causal"), (False, "bidirectional")):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
        guide = capture(Masked(layer, mask), torch.randn(1, 6, 8), dynamic={})
        values = record(guide.graph_module, {"x": torch.randn(1, 6, 8)})
        region = partition(data_flow(guide.graph_module.graph))[0].region
        assert probe_mixing(region, values) == found


class Masked(nn.Module):
    def __init__(self, layer: nn.Module, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.layer, self.out, self.mask = layer, nn.Linear(8, 2), mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x, self.mask))


def test_channels_first_is_told_from_a_sequence_that_is_turned_round_inside():
    for turned, expected in ((False, True), (True, False)):
        flow = data_flow(capture(Convolutions(turned), vectors(2, 8, 8)).graph_module.graph)
        assert {is_channels_first(p.region) for p in partition(flow)} == {expected}


def test_a_guide_with_time_before_the_batch_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(PlanError, match=r"layers\.0.*: one example of a batch changes the output of another"):
        make_plan(capture(model, vectors(6, 5, 8)), "rnn")


class Memory(nn.Module):
    """x + W mean over the sequence: every output sees every input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).mean(1, keepdim=True)
        return x


def test_what_looks_ahead_from_the_last_token_alone_is_bidirectional():
    class Last(Memory):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)[:, -1:]
            return x

    for model in (Memory(), Last()):
        guide = capture(model, vectors(2, 5, 8))
        values = captured.recorded(guide)
        assert {probe_mixing(p.region, values) for p in partition(captured.flow_of(guide))} == {"bidirectional"}


def test_a_region_is_probed_once_on_the_same_recording(monkeypatch):
    guide = captured.gpt2()
    values = captured.recorded(guide)
    region = partition(captured.flow_of(guide))[0].region
    first = probe_mixing(region, values)
    monkeypatch.setattr("thesean.passes.analyse.mixing.evaluate", None)
    assert probe_mixing(region, values) == first


@pytest.mark.parametrize(("padding", "mixing"), [("causal", "causal"), ("both", "bidirectional")])
def test_a_kernel_that_reaches_far_is_no_token_wise_part(padding, mixing):
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Conv1d(8, 8, 2 if padding == "causal" else 3, dilation=20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = (20, 0) if padding == "causal" else (20, 20)
            return x + self.kernel(nn.functional.pad(x.transpose(1, 2), (left, right))).transpose(1, 2)

    torch.manual_seed(0)
    guide = capture(nn.Sequential(Far(), Far(), Far(), nn.Linear(8, 3)).eval(), vectors(2, 12, 8))
    plan = make_plan(guide, Target("linear"), parts=["0", "1", "2"]).plan
    assert {p.mixing for p in plan} == {mixing}
