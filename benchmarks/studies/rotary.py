"""What does the guide's rotation do for a window, and what without? On a small rotary model with grouped queries.

A Llama of four layers is trained on the demo's text first and kept in build/. Its twin with learned positions is the
demo's own guide (the cases of window.py). "not turned": the same conversion with the rotation left out.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.positions import Study
from examples.text import ALPHABET
from thesean.targets.linear_attention import LinearAttention


def rotary(layers: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(ALPHABET), hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, use_cache=False,
            tie_word_embeddings=True, initializer_range=0.05, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def not_turned(made: LinearAttention) -> None:
    """Its window meets queries and keys as they were projected."""
    assert made.window is not None
    assert made.window.sinks is not None
    made.rotation, made.window.rotate, made.window.sinks.rotate = None, None, None


STUDY = Study(name="rotary", model=rotary, mixers="*self_attn", left_out="not turned", leave_out=not_turned)

CASE = STUDY.case("What does the guide's rotation do for a window, and what without?")
