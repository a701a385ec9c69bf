"""Guides of many architectures, small, with seeded random weights: the matrix that the compiler has to take.

Hugging Face's come from configurations, the others are written here; nothing is downloaded. A guide's inputs are made
at any batch size and, where time is dynamic, any length.

B batch, T time, S time of a second sequence, D width, C channels, H height, W width of an image
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from tests.hand_written import (
    ConvNet1d,
    Looped,
    LSTMClassifier,
    LSTMTagger,
    Mixer,
    ResNetShape,
    Tied,
    TwoInputs,
    TwoOutputs,
    post_norm_encoder,
)
from tests.models import VOCABULARY, spread, vectors

LENGTH = 12
_WIDTH, _HEADS, _LAYERS = 16, 2, 2

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Guide:
    """`inputs(batch, length, seed)` by the names of forward; `time` tells whether lengths other than the traced run."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    time: bool = True

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return spread(self.build().eval())

    def example(self) -> Inputs:
        return self.inputs(3, LENGTH, 0)

    def batches(self, count: int = 4) -> list[Inputs]:
        return [self.inputs(3, LENGTH, seed) for seed in range(count)]


def ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _tokens(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": ids(batch, length, seed)}


def _masked(batch: int, length: int, seed: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -(length // 3) :] = 0
    return {"input_ids": ids(batch, length, seed), "attention_mask": mask}


def _typed(batch: int, length: int, seed: int) -> Inputs:
    types = (torch.arange(length) >= length // 2).long().expand(batch, length).clone()
    return {**_masked(batch, length, seed), "token_type_ids": types}


def _seq2seq(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": ids(batch, length, seed), "decoder_input_ids": ids(batch, length + 1, seed + 1)}


def _float(name: str, *shape: int | None) -> Callable[[int, int, int], Inputs]:
    """(batch, *shape), where None is the length."""
    return lambda batch, length, seed: {
        name: vectors(batch, *(length if size is None else size for size in shape), seed=seed)
    }


def _sizes(**more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=64,
        **more,
    )


def gpt2(layers: int = _LAYERS, width: int = _WIDTH, heads: int = _HEADS, vocabulary: int = VOCABULARY) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=layers, n_head=heads)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes(rotary_pct=0.5), bos_token_id=0, eos_token_id=0))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(num_key_value_heads=1)))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_sizes(num_key_value_heads=1)))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=_WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS,
            ffn_dim=2 * _WIDTH, max_position_embeddings=64, word_embed_proj_dim=_WIDTH,
        )
    )  # fmt: skip


def mixtral(experts: str | None = None) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_sizes(num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2))
    if experts is not None:
        config._experts_implementation = experts
    return MixtralForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_sizes(pad_token_id=0)), add_pooling_layer=False)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=_WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS, intermediate_size=2 * _WIDTH,
            image_size=12, patch_size=4, num_labels=5,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=_WIDTH, d_kv=8, d_ff=2 * _WIDTH, num_layers=_LAYERS, num_heads=_HEADS,
            relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
        )
    )  # fmt: skip


def whisper_encoder() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        WhisperConfig(
            d_model=_WIDTH, encoder_layers=_LAYERS, encoder_attention_heads=_HEADS, encoder_ffn_dim=2 * _WIDTH,
            num_mel_bins=8, max_source_positions=10, vocab_size=VOCABULARY,
        )
    )  # fmt: skip


GUIDES: dict[str, Guide] = {
    "gpt2": Guide(build=gpt2, inputs=_tokens),
    "gpt_neox": Guide(build=gpt_neox, inputs=_tokens),
    "llama": Guide(build=llama, inputs=_tokens),
    "qwen2": Guide(build=qwen2, inputs=_tokens),
    "opt": Guide(build=opt, inputs=_masked),
    "mixtral": Guide(build=mixtral, inputs=_tokens),
    "bert": Guide(build=bert, inputs=_typed),
    "vit": Guide(build=vit, inputs=_float("pixel_values", 3, 12, 12), time=False),
    "t5": Guide(build=t5, inputs=_seq2seq),
    "whisper_encoder": Guide(build=whisper_encoder, inputs=_float("input_features", 8, 20), time=False),
    "resnet18": Guide(build=lambda: ResNetShape((2, 2, 2, 2), False), inputs=_float("image", 3, 32, 32), time=False),
    "resnet34": Guide(build=lambda: ResNetShape((3, 4, 6, 3), False), inputs=_float("image", 3, 32, 32), time=False),
    "resnet50": Guide(build=lambda: ResNetShape((3, 4, 6, 3), True), inputs=_float("image", 3, 32, 32), time=False),
    "mixer": Guide(build=Mixer, inputs=_float("image", 3, 12, 12), time=False),
    "encoder": Guide(build=post_norm_encoder, inputs=_float("src", None, _WIDTH)),
    "lstm_classifier": Guide(build=LSTMClassifier, inputs=_float("x", None, 8)),
    "lstm_tagger": Guide(build=LSTMTagger, inputs=_tokens),
    "convnet1d": Guide(build=ConvNet1d, inputs=_float("series", 3, 24), time=False),
    "two_inputs": Guide(
        build=TwoInputs,
        inputs=lambda batch, length, seed: {
            "left": vectors(batch, length, 8, seed=seed),
            "right": vectors(batch, length, 6, seed=seed + 100),
        },
    ),
    "two_outputs": Guide(build=TwoOutputs, inputs=_float("x", None, 8)),
    "tied": Guide(build=Tied, inputs=_tokens),
    "looped": Guide(build=Looped, inputs=_float("x", None, _WIDTH)),
}
