"""Small encoder-decoders: with relative positions, with learned ones and masks, and written by hand.

B batch, T steps of the target, S steps of the source, D width, H heads
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.captured import shared
from tests.models import VOCABULARY, seeded, spread, tokens
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured

WIDTH, HEADS = 16, 2


def t5(layers: int = 1) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=24, num_layers=layers, num_heads=HEADS,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return spread(T5ForConditionalGeneration(config).eval())


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=2,
    )  # fmt: skip
    return spread(BartForConditionalGeneration(config).eval())


def whisper() -> nn.Module:
    """Reads 8 bands of 24 frames, no more and no fewer."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=12, max_target_positions=64, d_model=WIDTH,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return spread(WhisperForConditionalGeneration(config).eval())


class Translator(nn.Module):
    """target_BT, source_BS, hidden_BS -> logits_BTV: torch's own layers, and the target in front."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.reader = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )
        self.writer = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 24, 0.0, batch_first=True), 2)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))

    def forward(self, target: torch.Tensor, source: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        memory = self.reader(self.embedded(source), src_key_padding_mask=hidden)
        ahead_TT = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        written = self.writer(
            self.embedded(target), memory, tgt_mask=ahead_TT, memory_key_padding_mask=hidden, tgt_is_causal=False
        )
        return self.head(written)


class Plain(nn.Module):
    """source_BS, target_BT -> logits_BTV: one layer of each by hand, batch and heads in one dimension, time first."""

    def __init__(self, bound: bool = False, causal: bool = True, heads: int = HEADS) -> None:
        super().__init__()
        self.bound, self.causal, self.count = bound, causal, heads
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.own, self.across = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.query, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def heads(self, x_TBD: torch.Tensor) -> torch.Tensor:
        steps, batch = x_TBD.shape[:2]
        return x_TBD.reshape(steps, batch * self.count, WIDTH // self.count).transpose(0, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        scores = q @ k.mT / 8**0.5
        if causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1)
        return mixed.reshape(mixed.shape[0], -1, WIDTH)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory_SBD = F.gelu(self.words(source)).transpose(0, 1)
        x_TBD = self.words(target).transpose(0, 1)
        if self.bound:
            x_TBD = x_TBD + memory_SBD
        q, k, v = (self.heads(p) for p in self.own(x_TBD).chunk(3, -1))
        x_TBD = x_TBD + self.attend(q, k, v, causal=self.causal)
        k, v = (self.heads(p) for p in self.across(memory_SBD).chunk(2, -1))
        x_TBD = x_TBD + self.attend(self.heads(self.query(x_TBD)), k, v, causal=False)
        return self.head(x_TBD).transpose(0, 1)


def t5_inputs(batch: int, source: int, target: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(batch, source, seed), "decoder_input_ids": tokens(batch, target, seed + 1)}


def masked(batch: int, source: int, target: int, seed: int = 0) -> dict[str, torch.Tensor]:
    found = t5_inputs(batch, source, target, seed)
    return {"attention_mask": torch.ones(batch, source, dtype=torch.int64), **found}


def whisper_inputs(batch: int, source: int, target: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`source` frames have to be 24."""
    features = torch.randn(batch, 8, source, generator=torch.Generator().manual_seed(seed))
    return {"input_features": features, "decoder_input_ids": tokens(batch, target, seed + 1)}


def translator_inputs(batch: int, source: int, target: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "target": tokens(batch, target, seed + 1),
        "source": tokens(batch, source, seed),
        "hidden": torch.zeros(batch, source, dtype=torch.bool),
    }


def plain_inputs(batch: int, source: int, target: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"source": tokens(batch, source, seed), "target": tokens(batch, target, seed + 1)}


Inputs = Callable[..., dict[str, torch.Tensor]]
GUIDES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "t5": (t5, t5_inputs),
    "bart": (bart, masked),
    "translator": (lambda: spread(seeded(Translator)), translator_inputs),
    "plain": (lambda: spread(seeded(Plain)), plain_inputs),
}


@shared
def guide(name: str) -> Captured:
    build, inputs = GUIDES[name]
    return capture(build(), inputs(3, 9, 7))
