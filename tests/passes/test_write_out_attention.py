"""B batch, H heads, T time of the queries, S time of the keys, K head width"""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from tests import captured, models
from tests.models import tokens, vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text
from thesean.passes.write_out_attention import WriteOutAttention

LENGTHS = (1, 7, 19)


class Attention(nn.Module):
    """x_BTD -> the attention of x to itself under a mask that `mask(T)` makes, over one head."""

    def __init__(self, mask=None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = x.unsqueeze(1)
        mask = None if self.mask is None else self.mask(x.shape[1])
        return F.scaled_dot_product_attention(head, head, head, attn_mask=mask).squeeze(1)


def causal(length: int) -> torch.Tensor:
    return torch.arange(length)[:, None] >= torch.arange(length)


def window(length: int) -> torch.Tensor:
    ago = torch.arange(length)[:, None] - torch.arange(length)
    return (ago >= 0) & (ago < 32)


def strictly_past(length: int) -> torch.Tensor:
    return torch.arange(length)[:, None] > torch.arange(length)


def everything(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def biased(length: int) -> torch.Tensor:
    return -0.1 * (torch.arange(length)[:, None] - torch.arange(length)).abs().float()


def written(guide: Captured, **settings) -> tuple[fx.GraphModule, str]:
    """The guide written out, and why it was not."""
    graph_module = clone(guide.graph_module)
    probes = tuple(
        guide.signature.random_inputs({s: 2 if s.startswith("batch") else n for s in guide.signature.symbols})
        for n in LENGTHS
    )
    return graph_module, WriteOutAttention(probes, **settings)(graph_module).reason


def fused(graph_module: fx.GraphModule) -> int:
    return sum("scaled_dot_product" in str(n.target) for n in graph_module.graph.nodes)


def test_the_graph_before_and_after():
    guide = capture(Attention(everything), vectors(2, 6, 4))
    graph_module, _ = written(guide)
    (before,) = [line for line in text(guide.graph_module.graph) if "aten.scaled" in line]
    assert before.endswith("aten.scaled_dot_product_attention.default(unsqueeze, unsqueeze, unsqueeze, ones)")
    assert text(graph_module.graph) == [
        "x = placeholder x",
        "unsqueeze = aten.unsqueeze.default(x, 1)",
        "transpose_int = aten.transpose.int(unsqueeze, -2, -1)",
        "matmul_default = aten.matmul.default(unsqueeze, transpose_int)",
        "mul_tensor = aten.mul.Tensor(matmul_default, 0.5)",
        "softmax_int = aten.softmax.int(mul_tensor, -1)",
        "matmul_default_1 = aten.matmul.default(softmax_int, unsqueeze)",
        "squeeze = aten.squeeze.dim(matmul_default_1, 1)",
        "return squeeze",
    ]


@pytest.mark.parametrize("mask", [None, causal, window, everything, biased])
def test_the_numbers_stay_at_lengths_that_were_not_probed(mask):
    guide = capture(Attention(mask), vectors(2, 6, 4))
    graph_module, _ = written(guide)
    assert not fused(graph_module)
    for length in (1, 6, 50):  # past the window
        x = vectors(3, length, 4, seed=length)
        torch.testing.assert_close(graph_module(x), guide.graph_module(x))


@pytest.mark.parametrize("guide", [captured.gpt2, captured.llama, captured.encoder])
def test_guides_are_written_out_and_their_masks_are_made_once(guide):
    guide = guide()
    graph_module, _ = written(guide)
    assert fused(guide.graph_module) > 1
    assert not fused(graph_module)
    assert sum("masked_fill" in n.name for n in graph_module.graph.nodes) <= 1
    inputs = guide.signature.random_inputs({"batch": 3, "time": 23}, seed=1)
    first, second = (
        next(iter(v.values())) if isinstance(v, dict) else v
        for v in (m(**inputs) for m in (guide.graph_module, graph_module))
    )
    torch.testing.assert_close(first, second)


def test_a_query_that_sees_nothing_keeps_its_guard():
    graph_module, reason = written(capture(Attention(strictly_past), vectors(2, 6, 4)))
    assert fused(graph_module) == 1
    assert reason == "a query may see no key"


def test_a_mask_of_the_callers_keeps_its_guard_unless_it_is_trusted():
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            head = x.unsqueeze(1)
            return F.scaled_dot_product_attention(head, head, head, attn_mask=mask[:, None, None]).squeeze(1)

    inputs = {"x": vectors(2, 6, 4), "mask": torch.ones(2, 6, dtype=torch.bool)}
    guide = capture(Masked(), inputs)
    assert written(guide)[1] == "a query may see no key"
    graph_module, _ = written(guide, trusted=frozenset({"mask"}))
    inputs["mask"][0, 4:] = False  # it may hide keys all the same
    torch.testing.assert_close(graph_module(**inputs), guide.graph_module(**inputs))


def test_a_padded_encoder_keeps_its_guards():
    inputs = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    graph_module, reason = written(capture(models.bert(), inputs))
    assert reason == "a query may see no key"
    assert fused(graph_module)


def test_a_graph_that_takes_chunks_is_left_alone():
    graph_module = clone(captured.gpt2().graph_module)
    graph_module.meta["states"] = ()  # as ThreadState leaves it
    result = WriteOutAttention(())(graph_module)
    assert result.reason == "the graph takes chunks with a state"
    assert fused(graph_module) == 2


def test_a_graph_without_attention_is_left_alone():
    assert written(captured.mlp())[1] == "no attention is computed"


def example() -> Example:
    guide = captured.gpt2()
    probes = tuple(guide.signature.random_inputs({"batch": 2, "time": n}) for n in LENGTHS)
    return Example(WriteOutAttention(probes), clone(guide.graph_module), (tokens(),))
