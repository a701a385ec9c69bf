"""Small causal language models: each way in which an attention that is kept may read the past.

B batch, T time, H heads, K head width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.captured import shared
from tests.models import VOCABULARY, gpt2, seeded, spread, tokens
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured

WIDTH, HEADS, WINDOW = 32, 4, 5


def _sizes(**more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=64, **more,
    )  # fmt: skip


def _family(name: str, **settings: Any) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}TextConfig" if name in ("Gemma3", "Qwen3_5") else f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(config(**settings, attn_implementation=attention))

    return build


_OPT = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, ffn_dim=48,
    max_position_embeddings=64, word_embed_proj_dim=WIDTH,
)  # fmt: skip
_NEO = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=HEADS, intermediate_size=48, bos_token_id=0,
    max_position_embeddings=64, attention_types=[[["global", "local"], 1]], window_size=WINDOW, eos_token_id=0,
)  # fmt: skip
_GEMMA = _sizes(num_key_value_heads=1, head_dim=8)

FAMILIES: dict[str, Callable[[str], nn.Module]] = {
    "gpt2": lambda attention: gpt2(attention=attention),
    "gpt_neo": _family("GPTNeo", **_NEO),  # every second layer has a window, in a stored mask
    "gpt_neox": _family("GPTNeoX", **_sizes(rotary_pct=0.5)),
    "opt": _family("OPT", **_OPT),
    "llama": _family("Llama", **_sizes(num_key_value_heads=2)),
    "qwen2": _family("Qwen2", **_sizes(num_key_value_heads=2)),
    "qwen3": _family("Qwen3", **_sizes(num_key_value_heads=2, head_dim=8)),
    "mistral": _family("Mistral", **_sizes(num_key_value_heads=2, sliding_window=WINDOW)),
    "gemma": _family("Gemma", **_GEMMA),
    "gemma2": _family("Gemma2", **_GEMMA, sliding_window=WINDOW),  # bent scores, and a window every second layer
    "gemma3": _family("Gemma3", **_GEMMA, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "gpt_oss": _family(
        "GptOss",
        **_sizes(num_key_value_heads=2, head_dim=8),
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    ),  # sinks, and experts
    "bloom": _family("Bloom", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=HEADS),  # ALiBi
}
# beside attentions other mixers that read earlier steps
MIXED: dict[str, Callable[[str], nn.Module]] = {
    "lfm2": _family(
        "Lfm2", **{**_sizes(num_key_value_heads=2), "num_hidden_layers": 3}, conv_L_cache=3, block_multiple_of=8,
        layer_types=["conv", "full_attention", "conv"], pad_token_id=0,
    ),  # short causal convolutions
    "qwen3_5": _family(
        "Qwen3_5", **_sizes(num_key_value_heads=2, head_dim=8), linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=4, layer_types=["linear_attention", "full_attention"],
    ),  # a gated delta rule behind a short convolution, and an attention with a gate
    "granitemoehybrid": _family(
        "GraniteMoeHybrid", **_sizes(num_key_value_heads=2), shared_intermediate_size=48, num_local_experts=0,
        mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4, pad_token_id=0,
        layer_types=["mamba", "attention"],
    ),  # a state space behind a short convolution
}  # fmt: skip
_EAGER = ("gpt_neo", "gemma2", "gpt_oss", "bloom")  # have no other attention
# what has no table of positions runs past the length that it was trained at
ENDLESS = (
    "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt_oss", "bloom", "lfm2",
    "qwen3_5", "granitemoehybrid",
)  # fmt: skip


@shared
def family(name: str, attention: str = "sdpa", masked: bool = False) -> Captured:
    """A guide of `FAMILIES` or `MIXED` as a graph; `masked`: it is told which steps are padding."""
    torch.manual_seed(0)
    example = {"input_ids": tokens(3, 11)}
    if masked:
        example["attention_mask"] = torch.ones(3, 11, dtype=torch.int64)
    return capture(spread({**FAMILIES, **MIXED}[name]("eager" if name in _EAGER else attention).eval()), example)


class Attending(nn.Module):
    """ids_BT -> logits_BTV, one attention whose scores, mask and heads are written as `spelling` says."""

    def __init__(self, spelling: str, window: int = 3) -> None:
        super().__init__()
        self.spelling, self.window = spelling, window
        self.words = nn.Embedding(VOCABULARY, 16)
        self.query, self.key, self.value, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, VOCABULARY)
        self.sinks = nn.Parameter(torch.tensor([-0.5, 1.0]))
        self.register_buffer("lower", torch.tril(torch.ones(1, 1, 64, 64)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        mixed = getattr(self, self.spelling)(self.query(x), self.key(x), self.value(x))
        return self.head(x + self.last(mixed))

    def heads(self, *x_BTD: torch.Tensor) -> list[torch.Tensor]:
        return [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in x_BTD]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **mask: Any) -> torch.Tensor:
        q, k, v = self.heads(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2).flatten(2)

    def fused(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(q, k, v, is_causal=True)

    def grouped(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(q, k, v)
        shared = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)
        return shared.transpose(1, 2).flatten(2)

    def repeated(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Written out, one head of keys and values for both of queries."""
        q, k, v = self.heads(q, k, v)
        k, v = (x[:, :1].repeat_interleave(2, 1) for x in (k, v))
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def stored(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A buffer of ones cut to length, as in nanoGPT."""
        q, k, v = self.heads(q, k, v)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(8))
        scores = scores.masked_fill(self.lower[:, :, : q.shape[2], : q.shape[2]] == 0, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def _biased(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_HTT: torch.Tensor) -> torch.Tensor:
        ahead_TT = torch.ones_like(bias_HTT[0], dtype=torch.bool).triu(1)
        return self.attend(q, k, v, attn_mask=bias_HTT.masked_fill(ahead_TT, -math.inf).unsqueeze(0))

    def leaning(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """ALiBi: a slope a head."""
        step_T = torch.arange(q.shape[1])
        return self._biased(q, k, v, torch.tensor([-0.5, -0.125]).view(2, 1, 1) * (step_T[:, None] - step_T))

    def tabled(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A table of relative positions whose last row is that of all that is farther."""
        step_T = torch.arange(q.shape[1])
        apart_TT = (step_T[:, None] - step_T).clamp(0, 7)
        return self._biased(q, k, v, self.words.weight[:8, :2].T[:, apart_TT])

    def placed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A bias of where a key stands, however far it is."""
        return self._biased(q, k, v, torch.arange(q.shape[1]).sin().expand(2, q.shape[1], -1))

    def packed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Batch and heads in one dimension."""
        q, k, v = (x.flatten(0, 1) for x in self.heads(q, k, v))
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        scores = torch.bmm(q / 8, k.permute(0, 2, 1)) + torch.zeros_like(hidden, dtype=q.dtype).masked_fill(
            hidden, -1e9
        )
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)

    def single(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One head, and no dimension for it."""
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        return (q @ k.mT / 4).masked_fill(hidden, -math.inf).softmax(-1) @ v

    def bent(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(q, k, v)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = 3.0 * torch.tanh(q @ k.mT / 6.0)
        return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def windowed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        step_T = torch.arange(q.shape[1])
        age_TT = step_T.unsqueeze(1) - step_T
        seen_TT = (age_TT >= 0) & (age_TT < self.window)
        return self.attend(q, k, v, attn_mask=seen_TT)

    def strided(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Every second step: causal, and no window."""
        step_T = torch.arange(q.shape[1])
        age_TT = step_T.unsqueeze(1) - step_T
        seen_TT = (age_TT >= 0) & (age_TT % 2 == 0)
        return self.attend(q, k, v, attn_mask=seen_TT)

    def clamped(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Scores of which none is larger than 0.1."""
        q, k, v = self.heads(q, k, v)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.mT).clamp(max=0.1).masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def sunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Weights that sum to less than 1."""
        q, k, v = self.heads(q, k, v)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1)
        return (weights * 0.5 @ v).transpose(1, 2).flatten(2)

    def sinking(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A score a head that takes its share of the weights, as in gpt-oss; weights in float32."""
        q, k, v = self.heads(q, k, v)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT * 0.5).masked_fill(hidden, -math.inf)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        both = torch.cat([scores, sinks], -1)
        weights = (both - both.max(-1, keepdim=True).values).softmax(-1, dtype=torch.float32)[..., :-1]
        return (weights @ v).transpose(1, 2).flatten(2)

    def draining(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same, taken off what the weights made, as in Granite's."""
        q, k, v = self.heads(q, k, v)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT * 0.5).masked_fill(hidden, -math.inf)
        share = (torch.logsumexp(scores, -1) - self.sinks.view(1, -1, 1)).float().sigmoid()
        mixed = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return (mixed * share.unsqueeze(-1).to(v.dtype)).transpose(1, 2).flatten(2)

    def one_more(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """exp(x) / (1 + sum of exp(x)): a key in front whose score is 0."""
        q, k, v = self.heads(q, k, v)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = F.pad((q @ k.mT).masked_fill(hidden, -math.inf), (1, 0))
        return (scores.softmax(-1)[..., 1:] @ v).transpose(1, 2).flatten(2)

    def ahead(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(q, k, v)


@shared
def attending(spelling: str, window: int = 3) -> Captured:
    return capture(seeded(Attending, spelling, window), {"ids": tokens(3, 13)})
