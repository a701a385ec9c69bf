"""Hugging Face's architectures from configurations: sizes by whatever a configuration calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.specimen import (
    HEADS,
    IMAGE,
    SEQUENCE,
    VISION,
    VOCABULARY,
    WIDTH,
    Specimen,
    cast,
    image,
    masked,
    seq2seq,
    tokens,
    wave,
)

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads"), HEADS),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dff",
         "d_inner", "ffn_hidden_size"), 2 * WIDTH),
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "n_positions": 128, "max_seq_len": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    "image_size": IMAGE, "patch_size": 8, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1,
}  # fmt: skip

_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8
}  # fmt: skip
# recurrences of matrices, and a few attentions
_HYBRIDS: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {**_DELTA, "mlp_only_layers": [0, 1]}, "Qwen3_5ForCausalLM": _DELTA,
    "OlmoHybridForCausalLM": {**_DELTA, "linear_num_key_heads": 4},
    "GraniteMoeHybridForCausalLM": {
        **_MAMBA_2, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64
    },
    "BambaForCausalLM": {**_MAMBA_2, "attn_layer_indices": [1]}, "FalconH1ForCausalLM": {**_MAMBA_2, "mamba_d_ssm": 64},
    "NemotronHForCausalLM": {
        "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 8,
        "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
    },
    "JambaForCausalLM": {
        "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "FalconMambaForCausalLM": {"state_size": 4},
}  # fmt: skip
# model class -> (inputs, targets, what else its configuration needs)
_CAUSAL: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {}, "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "GPTNeoXForCausalLM": {}, "GPTJForCausalLM": {"rotary_dim": 4}, "CodeGenForCausalLM": {"rotary_dim": 4},
    "OPTForCausalLM": {"word_embed_proj_dim": WIDTH}, "BloomForCausalLM": {}, "FalconForCausalLM": {},
    "MptForCausalLM": {}, "LlamaForCausalLM": {}, "MistralForCausalLM": {"sliding_window": 6},
    "Qwen2ForCausalLM": {}, "Qwen3ForCausalLM": {}, "GemmaForCausalLM": {}, "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {}, "PhiForCausalLM": {}, "Phi3ForCausalLM": {}, "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {}, "CohereForCausalLM": {}, "OlmoForCausalLM": {}, "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {}, "GlmForCausalLM": {}, "NemotronForCausalLM": {}, "PersimmonForCausalLM": {},
    "XGLMForCausalLM": {"attention_heads": HEADS}, "BioGptForCausalLM": {}, "CTRLLMHeadModel": {},
    "GPTBigCodeForCausalLM": {}, "HeliumForCausalLM": {}, "SmolLM3ForCausalLM": {}, "Exaone4ForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 2}, "Qwen2MoeForCausalLM": {"num_experts": 2, "num_experts_per_tok": 1},
    "MambaForCausalLM": {"state_size": 4}, "Mamba2ForCausalLM": {"state_size": 4, "num_heads": 8, "n_groups": 1},
    "RwkvForCausalLM": {"attention_hidden_size": WIDTH}, "RecurrentGemmaForCausalLM": {"lru_width": WIDTH},
    "OpenAIGPTLMHeadModel": {}, "SeedOssForCausalLM": {}, "ApertusForCausalLM": {}, "ArceeForCausalLM": {},
    "Lfm2ForCausalLM": {}, **_HYBRIDS,
}  # fmt: skip
_ENCODERS: dict[str, dict[str, Any]] = {
    "BertModel": {}, "RobertaModel": {}, "DistilBertModel": {}, "AlbertModel": {"embedding_size": 16},
    "ElectraModel": {}, "DebertaV2Model": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DebertaModel": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "MPNetModel": {},
    "XLMRobertaModel": {}, "CamembertModel": {}, "ConvBertModel": {"head_ratio": 2, "num_groups": 1},
    "FNetModel": {}, "SqueezeBertModel": {},
    "RoFormerModel": {}, "ModernBertModel": {}, "EsmModel": {}, "XLMModel": {"emb_dim": WIDTH}, "ErnieModel": {},
    "MegatronBertModel": {}, "MobileBertModel": {"true_hidden_size": 32, "intra_bottleneck_size": 32,
    "embedding_size": 32}, "LayoutLMModel": {}, "CanineModel": {}, "IBertModel": {}, "BigBirdModel":
    {"attention_type": "original_full"}, "NomicBertModel": {}, "BertForSequenceClassification": {},
    "BertForTokenClassification": {}, "BertForQuestionAnswering": {}, "GPT2ForSequenceClassification": {},
    "T5EncoderModel": {}, "UMT5EncoderModel": {}, "XLNetModel": {},
}  # fmt: skip
_SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {}, "MT5ForConditionalGeneration": {}, "BartForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {}, "MarianMTModel": {}, "BlenderbotForConditionalGeneration": {},
    "MBartForConditionalGeneration": {}, "M2M100ForConditionalGeneration": {},
}  # fmt: skip
_IMAGES: dict[str, dict[str, Any]] = {
    "ViTModel": {}, "DeiTModel": {}, "BeitModel": {}, "Dinov2Model": {}, "CLIPVisionModel": {},
    "SiglipVisionModel": {}, "ViTMAEModel": {"mask_ratio": 0.0}, "Data2VecVisionModel": {}, "IJepaModel": {},
    "YolosModel": {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 4}, "Dinov2WithRegistersModel": {},
}  # fmt: skip
_WINDOWED = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "num_attention_heads": [2, 2], "window_size": 2,
    "patch_size": 4,
}  # fmt: skip
_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "ResNetModel": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
    "RegNetModel": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "groups_width": 8},
    "ConvNextModel": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 2]},
    "ConvNextV2Model": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 2]},
    "MobileNetV1Model": {"depth_multiplier": 0.25}, "MobileNetV2Model": {"depth_multiplier": 0.25},
    "PoolFormerModel": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "BitModel": {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4},
    "EfficientNetModel": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "SwinModel": _WINDOWED,
    "Swinv2Model": _WINDOWED,
    "PvtModel": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    "SegformerModel": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    "FocalNetModel": {"embed_dim": 16, "depths": [2, 2], "hidden_sizes": [16, 32], "focal_levels": [1, 1],
                      "focal_windows": [3, 3], "patch_size": 4},
}  # fmt: skip
_AUDIO: dict[str, dict[str, Any]] = {
    name: {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
           "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    for name in ("Wav2Vec2Model", "HubertModel", "WavLMModel", "Data2VecAudioModel", "SEWModel", "UniSpeechSatModel")
}  # fmt: skip


def hugging_face() -> Iterator[Specimen]:
    kinds: list[tuple[dict[str, dict[str, Any]], Any, tuple[str, ...], bool]] = [
        (_CAUSAL, tokens, SEQUENCE, True), (_ENCODERS, masked, SEQUENCE, True), (_SEQ2SEQ, seq2seq, SEQUENCE, True),
        (_IMAGES, image(), SEQUENCE, False), (_CONVOLUTIONS, image(), VISION, False), (_AUDIO, wave, SEQUENCE, False),
    ]  # fmt: skip
    for table, inputs, targets, lengths in kinds:
        for name, settings in table.items():
            build = from_config(name, settings)
            yield Specimen(name=name, build=build, inputs=inputs, targets=targets, lengths=lengths)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM"):
        build = from_config(name, _CAUSAL[name])
        yield Specimen(name=f"{name}, padded", build=build, inputs=masked, targets=SEQUENCE)
        yield Specimen(name=f"{name}, in a wrapper", build=_wrapped(build), inputs=tokens, targets=SEQUENCE)
        yield Specimen(name=f"{name}, bfloat16", build=cast(build, torch.bfloat16), inputs=tokens, targets=SEQUENCE)
        yield Specimen(name=f"{name}, float64", build=cast(build, torch.float64), inputs=tokens, targets=SEQUENCE)


def from_config(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        config_class = cls.config_class
        known = set(vars(config_class())) | set(getattr(config_class, "attribute_map", {}))
        sizes = {k: v for k, v in _SMALL.items() if k in known}
        return cls(config_class(**{**sizes, **settings}))

    return build


class Wrapper(nn.Module):
    """What people put around a model: it returns the inner model's logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(input_ids).logits
        return logits


def _wrapped(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Wrapper(build())
