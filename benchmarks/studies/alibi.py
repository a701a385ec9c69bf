"""What does the guide's bias of distance do for a window, and what without? On a small ALiBi model.

A Bloom of four layers is trained on the demo's text first and kept in build/, as rotary.py does with its own. "not
biased": the same conversion whose window and sinks leave the bias out; the memories of its heads follow it as ever.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.positions import Study
from examples.text import ALPHABET
from thesean.targets.linear_attention import LinearAttention


def alibi(layers: int, width: int) -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=len(ALPHABET), hidden_size=width, n_layer=layers, n_head=4, use_cache=False,
            hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.05, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def not_biased(made: LinearAttention) -> None:
    """Its window and sinks add nothing for the distance."""
    assert made.window is not None
    made.bias, made.window.bias = None, None


STUDY = Study(name="alibi", model=alibi, mixers="*self_attention", left_out="not biased", leave_out=not_biased)

CASE = STUDY.case("What does the guide's bias of distance do for a window, and what without?")
