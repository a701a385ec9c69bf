"""The guide as a careful engineer would serve it without Thesean: one token a step, with a key-value cache, in ONNX.

B batch, T cached tokens, H heads, K head width
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from thesean.deploy.lowering.to_onnx import quiet


class CachedStep(nn.Module):
    """ids_B1, position_1, caches 2 x layers of (B, H, T, K) -> logits, the new token's keys and values."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model
        self.heads = model.config.n_head

    def forward(self, ids_B1: torch.Tensor, position_1: torch.Tensor, cache: list[torch.Tensor]) -> Any:
        body = self.model.transformer
        x = body.wte(ids_B1) + body.wpe(position_1)
        new = []
        for i, block in enumerate(body.h):
            q, k, v = (
                z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            )
            keys, values = torch.cat([cache[2 * i], k], 2), torch.cat([cache[2 * i + 1], v], 2)
            mixed = F.scaled_dot_product_attention(q, keys, values)
            x = x + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
            new += [k, v]
        return (self.model.lm_head(body.ln_f(x)), *new)


def export_cached_step(model: GPT2LMHeadModel, path: Path) -> None:
    """Write the step to `path`, after checking that it continues a prefix as the whole model does."""
    step, config = CachedStep(model).eval(), model.config
    tokens = torch.randint(0, config.vocab_size, (1, 9))
    shape = (1, config.n_head, 0, config.n_embd // config.n_head)
    cache = [torch.zeros(shape) for _ in range(2 * config.n_layer)]
    with torch.no_grad():
        for t in range(9):
            logits, *new = step(tokens[:, t : t + 1], torch.tensor([t]), cache)
            cache = [torch.cat(pair, 2) for pair in zip(cache, new, strict=True)]
        torch.testing.assert_close(logits[:, 0], model(tokens).logits[:, -1], rtol=1e-4, atol=1e-4)
    with quiet():
        program = torch.onnx.export(
            step,
            (tokens[:, :1], torch.tensor([9]), cache),
            input_names=["input_ids", "position", *(f"past_{i}" for i in range(len(cache)))],
            dynamic_shapes=(None, None, [{2: Dim.DYNAMIC}] * len(cache)),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def cached_step(path: Path, model: GPT2LMHeadModel, context: int) -> Callable[[], Any]:
    """One token after `context` cached ones, ready to be timed. Past the position table, at its last row."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    config = model.config
    shape = (1, config.n_head, context, config.n_embd // config.n_head)
    past = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feeds: dict[str, np.ndarray] = {f"past_{i}": past for i in range(2 * config.n_layer)}
    feeds["input_ids"] = np.zeros((1, 1), np.int64)
    feeds["position"] = np.array([min(context, config.n_positions - 1)])
    return lambda: session.run(None, feeds)
