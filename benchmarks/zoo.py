"""Small guides of many architectures with random weights, for the matrix: Hugging Face's from configurations, and
hand-written ones with what real code does in forward. Nothing is downloaded.

B batch, T time, D width, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, LENGTH, IMAGE = 64, 12, 32
_WIDTH, _HEADS, _LAYERS = 32, 4, 2

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """`inputs(batch, length, seed)` by the names of forward. `targets`: what it is asked to become."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    targets: tuple[str, ...]
    lengths: bool = True  # other lengths than the traced one run

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():  # configurations begin with weights so small that layers hardly speak
            for p in model.parameters():
                if p.ndim > 1 and p.is_floating_point():
                    p.mul_(2.0)
        return model


def specimens() -> Iterator[Specimen]:
    yield from _hugging_face()
    yield from _hand_written()


# inputs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(batch: int, length: int, seed: int, low: int = 3) -> torch.Tensor:
    return torch.randint(low, VOCABULARY, (batch, length), generator=_generator(seed))


def tokens(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": ids(batch, length, seed)}


def masked(batch: int, length: int, seed: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": ids(batch, length, seed), "attention_mask": mask}


def seq2seq(batch: int, length: int, seed: int) -> Inputs:
    return {"input_ids": ids(batch, length, seed), "decoder_input_ids": ids(batch, length + 1, seed + 1)}


def image(size: int = IMAGE) -> Callable[[int, int, int], Inputs]:
    return lambda batch, length, seed: {"pixel_values": torch.randn(batch, 3, size, size, generator=_generator(seed))}


def wave(batch: int, length: int, seed: int) -> Inputs:
    return {"input_values": torch.randn(batch, 1600, generator=_generator(seed))}


def vectors(name: str, width: int) -> Callable[[int, int, int], Inputs]:
    return lambda batch, length, seed: {name: torch.randn(batch, length, width, generator=_generator(seed))}


# Hugging Face: sizes by whatever a configuration calls them

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers"), _LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dff",
         "d_inner", "ffn_hidden_size"), 2 * _WIDTH),
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "n_positions": 128, "max_seq_len": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    "image_size": IMAGE, "patch_size": 8, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1,
}  # fmt: skip

_LM = ("rnn", "narrow")
_VISION, _PATCHES = ("mlp", "conv"), ("rnn", "narrow")

# model class -> (inputs, targets, what else its configuration needs)
_CAUSAL: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {}, "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "GPTNeoXForCausalLM": {}, "GPTJForCausalLM": {"rotary_dim": 4}, "CodeGenForCausalLM": {"rotary_dim": 4},
    "OPTForCausalLM": {"word_embed_proj_dim": _WIDTH}, "BloomForCausalLM": {}, "FalconForCausalLM": {},
    "MptForCausalLM": {}, "LlamaForCausalLM": {}, "MistralForCausalLM": {"sliding_window": 6},
    "Qwen2ForCausalLM": {}, "Qwen3ForCausalLM": {}, "GemmaForCausalLM": {}, "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {}, "PhiForCausalLM": {}, "Phi3ForCausalLM": {}, "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {}, "CohereForCausalLM": {}, "OlmoForCausalLM": {}, "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {}, "GlmForCausalLM": {}, "NemotronForCausalLM": {}, "PersimmonForCausalLM": {},
    "XGLMForCausalLM": {"attention_heads": _HEADS}, "BioGptForCausalLM": {}, "CTRLLMHeadModel": {},
    "GPTBigCodeForCausalLM": {}, "HeliumForCausalLM": {}, "SmolLM3ForCausalLM": {}, "Exaone4ForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 2}, "Qwen2MoeForCausalLM": {"num_experts": 2, "num_experts_per_tok": 1},
    "MambaForCausalLM": {"state_size": 4}, "Mamba2ForCausalLM": {"state_size": 4, "num_heads": 8, "n_groups": 1},
    "RwkvForCausalLM": {"attention_hidden_size": _WIDTH}, "RecurrentGemmaForCausalLM": {"lru_width": _WIDTH},
    "OpenAIGPTLMHeadModel": {}, "SeedOssForCausalLM": {}, "ApertusForCausalLM": {}, "ArceeForCausalLM": {},
    "Lfm2ForCausalLM": {},
}  # fmt: skip
_ENCODERS: dict[str, dict[str, Any]] = {
    "BertModel": {}, "RobertaModel": {}, "DistilBertModel": {}, "AlbertModel": {"embedding_size": 16},
    "ElectraModel": {}, "DebertaV2Model": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DebertaModel": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "MPNetModel": {},
    "XLMRobertaModel": {}, "CamembertModel": {}, "ConvBertModel": {"head_ratio": 2, "num_groups": 1},
    "FNetModel": {}, "SqueezeBertModel": {},
    "RoFormerModel": {}, "ModernBertModel": {}, "EsmModel": {}, "XLMModel": {"emb_dim": _WIDTH}, "ErnieModel": {},
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


def _hugging_face() -> Iterator[Specimen]:
    kinds: list[tuple[dict[str, dict[str, Any]], Any, tuple[str, ...], bool]] = [
        (_CAUSAL, tokens, _LM, True), (_ENCODERS, masked, _LM, True), (_SEQ2SEQ, seq2seq, _LM, True),
        (_IMAGES, image(), _PATCHES, False), (_CONVOLUTIONS, image(), _VISION, False), (_AUDIO, wave, _LM, False),
    ]  # fmt: skip
    for table, inputs, targets, lengths in kinds:
        for name, settings in table.items():
            build = from_config(name, settings)
            yield Specimen(name=name, build=build, inputs=inputs, targets=targets, lengths=lengths)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM"):
        build = from_config(name, _CAUSAL[name])
        yield Specimen(name=f"{name}, padded", build=build, inputs=masked, targets=_LM)
        yield Specimen(name=f"{name}, in a wrapper", build=_wrapped(build), inputs=tokens, targets=_LM)
        yield Specimen(name=f"{name}, bfloat16", build=_cast(build, torch.bfloat16), inputs=tokens, targets=_LM)
        yield Specimen(name=f"{name}, float64", build=_cast(build, torch.float64), inputs=tokens, targets=_LM)


def from_config(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        config_class = cls.config_class
        known = set(vars(config_class())) | set(getattr(config_class, "attribute_map", {}))
        sizes = {k: v for k, v in _SMALL.items() if k in known}
        return cls(config_class(**{**sizes, **settings}))

    return build


def _cast(build: Callable[[], nn.Module], dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: build().to(dtype)


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


# hand-written


class Recurrent(nn.Module):
    """A table, a stack of cells, a head."""

    def __init__(self, cell: type[nn.RNN] | type[nn.GRU] | type[nn.LSTM], bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, _WIDTH)
        self.cell = cell(_WIDTH, _WIDTH, 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear((1 + bidirectional) * _WIDTH, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.cell(self.table(input_ids))[0])
        return out


class Encoder(nn.Module):
    """torch's own encoder with padding; `how` says where the mask comes from."""

    def __init__(self, how: str, norm_first: bool = False) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(VOCABULARY, _WIDTH)
        layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 2 * _WIDTH, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = attention_mask == 0
        if self.how == "lengths":
            lengths = attention_mask.sum(1)
            hidden = torch.arange(input_ids.shape[1], device=input_ids.device) >= lengths[:, None]
        out = self.encoder(self.table(input_ids), src_key_padding_mask=hidden)
        if self.how == "pooled":
            seen = attention_mask[..., None].to(out.dtype)
            out = (out * seen).sum(1) / seen.sum(1)
        result: torch.Tensor = self.head(out)
        return result


class Gpt(nn.Module):
    """A causal model as people write it: packed projections, a triangular buffer, scores by hand."""

    def __init__(self, rotary: bool = False, groups: int = _HEADS) -> None:
        super().__init__()
        self.rotary, self.groups, self.width = rotary, groups, _WIDTH // _HEADS
        self.table, self.places = nn.Embedding(VOCABULARY, _WIDTH), nn.Embedding(64, _WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(_WIDTH), "norm2": nn.LayerNorm(_WIDTH),
                "qkv": nn.Linear(_WIDTH, _WIDTH + 2 * groups * self.width), "out": nn.Linear(_WIDTH, _WIDTH),
                "up": nn.Linear(_WIDTH, 2 * _WIDTH), "down": nn.Linear(2 * _WIDTH, _WIDTH),
            })
            for _ in range(2)
        )  # fmt: skip
        self.causal = nn.Buffer(torch.ones(64, 64, dtype=torch.bool).tril())
        self.head = nn.Linear(_WIDTH, VOCABULARY, bias=False)

    def turned(self, x_BHTC: torch.Tensor) -> torch.Tensor:
        if not self.rotary:
            return x_BHTC
        angle_TP = torch.arange(x_BHTC.shape[2])[:, None] * 0.1 ** torch.arange(self.width // 2)
        pairs = torch.view_as_complex(x_BHTC.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_TP), angle_TP)).flatten(-2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        time = input_ids.shape[1]
        x = self.table(input_ids)
        if not self.rotary:
            x = x + self.places(torch.arange(time, device=input_ids.device))
        for block in self.blocks:
            query, key, value = block["qkv"](block["norm"](x)).split(
                [_WIDTH, self.groups * self.width, self.groups * self.width], -1
            )
            query, key, value = (z.unflatten(-1, (-1, self.width)).transpose(1, 2) for z in (query, key, value))
            key, value = (z.repeat_interleave(_HEADS // self.groups, 1) for z in (key, value))
            scores = self.turned(query) @ self.turned(key).transpose(-1, -2) / self.width**0.5
            scores = scores.masked_fill(~self.causal[:time, :time], -torch.inf)
            x = x + block["out"]((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        logits: torch.Tensor = self.head(x)
        return logits


class Temporal(nn.Module):
    """A causal convolutional network over channels-first sequences."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(6, 16)
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 3, dilation=2**k) for k in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).transpose(1, 2)
        for k, layer in enumerate(self.layers):
            reach = 2 * 2**k
            past = F.pad(x, (reach, 0)) if self.how == "pad" else torch.cat([x.new_zeros(*x.shape[:2], reach), x], 2)
            x = x + layer(past).relu()
        out: torch.Tensor = self.head(x.transpose(1, 2))
        return out


class Mixing(nn.Module):
    """Tokens mixed without a matrix."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "fourier":
            return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real
        if self.how == "mean":
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x.roll(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.mixed(x)
            x = x + layer(x).relu()
        out: torch.Tensor = self.head(x)
        return out


class Heads(nn.Module):
    """Policy and value beside each other, as agents have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()
        )
        self.policy, self.value = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(x)
        return {"logits": self.policy(x), "value": self.value(x)}


class Convnet(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = (x + block(x)).relu()
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


class Lora(nn.Module):
    """An adapter beside a frozen linear layer, as PEFT puts it there."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + 2.0 * self.up(self.down(x))
        return out


def _adapted() -> nn.Module:
    guide = Gpt()
    for block in guide.blocks:
        block["qkv"] = Lora(block["qkv"])
    return guide


def _hand_written() -> Iterator[Specimen]:
    for cell in (nn.LSTM, nn.GRU, nn.RNN):
        for both in (False, True):
            name = f"{'bidirectional ' if both else ''}{cell.__name__}"
            yield Specimen(name=name, build=partial(Recurrent, cell, both), inputs=tokens, targets=("rnn", "gru"))
    for how in ("mask", "lengths", "pooled"):
        yield Specimen(name=f"TransformerEncoder, {how}", build=partial(Encoder, how), inputs=masked, targets=_LM)
    before = partial(Encoder, "mask", True)
    yield Specimen(name="TransformerEncoder, norm first", build=before, inputs=masked, targets=_LM)
    written: dict[str, Callable[[], Any]] = {
        "": Gpt, ", compiled": lambda: torch.compile(Gpt()), ", DataParallel": lambda: nn.DataParallel(Gpt()),
        ", with adapters": _adapted, ", float16": _cast(Gpt, torch.float16),
        ", complex rotation": partial(Gpt, True, 2),
    }  # fmt: skip
    for how, build in written.items():
        yield Specimen(name=f"hand-written GPT{how}", build=build, inputs=tokens, targets=_LM)
    for how in ("pad", "cat"):
        name, build = f"causal convolutions, {how}", partial(Temporal, how)
        yield Specimen(name=name, build=build, inputs=vectors("x", 6), targets=("rnn", "gru"))
    for how in ("fourier", "mean", "roll"):
        name, build = f"mixing by {how}", partial(Mixing, how)
        yield Specimen(name=name, build=build, inputs=vectors("x", 16), targets=("rnn", "conv"))
    yield Specimen(name="policy and value", build=Heads, inputs=_states, targets=("mlp", "linear"), lengths=False)
    yield Specimen(name="residual convnet", build=Convnet, inputs=image(16), targets=_VISION, lengths=False)


def _states(batch: int, length: int, seed: int) -> Inputs:
    return {"x": torch.randn(batch, 12, generator=_generator(seed))}
