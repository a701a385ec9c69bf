"""B batch, T time, H heads, F width of queries and keys, K width of values"""

from __future__ import annotations

import torch

from tests import captured
from tests.models import tokens
from tests.passes.contract import Example
from tests.remembering_guides import remembering
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.kept_memory import KeptMemory
from thesean.passes.graph.opaque_memories import GATED_DELTA_RULE, MEMORIES
from thesean.passes.graph.text import text
from thesean.passes.memories_as_modules import MemoriesAsModules


def guide() -> Captured:
    return capture(remembering(), tokens(2, 9))


def around(lines: list[str], word: str) -> list[str]:
    at = next(k for k, line in enumerate(lines) if word in line)
    return lines[at : at + 3]


def test_the_graph_before_and_after():
    before = guide().graph_module
    rule = around(text(before.graph), "gated_delta_rule")
    given = rule[0].split("default(")[1]
    assert rule[0] == f"gated_delta_rule = thesean.gated_delta_rule.default({given}"
    result = MemoriesAsModules()(before)
    assert around(text(result.graph_module.graph), "memory_0") == [
        f"memory_0 = memory_0({given}",
        "getitem_2 = getitem(memory_0, 0)",
        rule[1].replace("gated_delta_rule", "getitem_2"),
    ]
    assert isinstance(result.graph_module.memory_0, KeptMemory)
    assert rule == around(text(before.graph), "gated_delta_rule")  # it stayed as it was
    ids = tokens(3, 80, seed=1)
    torch.testing.assert_close(result.graph_module(ids), before(ids))


def test_steps_with_the_state_equal_all_at_once():
    made = torch.Generator().manual_seed(0)
    memory = KeptMemory(MEMORIES[GATED_DELTA_RULE])
    given = [torch.randn(2, 12, 3, width, generator=made) / 2 for width in (4, 4, 5)]
    given += [torch.rand(2, 12, 3, generator=made), -torch.rand(2, 12, 3, generator=made)]
    whole, last = memory(*given)
    torch.testing.assert_close(whole, GATED_DELTA_RULE(*given))
    outs: list[torch.Tensor] = []
    carried: tuple[torch.Tensor, ...] = ()
    for chunk in zip(*(x.split([1, 4, 7], 1) for x in given), strict=True):
        out, state = memory(*chunk, *carried)
        carried = (state,)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)


def test_without_one_the_graph_is_the_same_object_and_the_reason_told():
    graph_module = captured.mlp().graph_module
    result = MemoriesAsModules()(graph_module)
    assert result.graph_module is graph_module
    assert result.reason == "the graph has no recurrence of matrices"


def example() -> Example:
    return Example(MemoriesAsModules(), guide().graph_module, (tokens(2, 9),))
