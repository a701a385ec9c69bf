"""B batch, T time, H heads, F width of queries and keys, K width of values"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from thesean.kernels.delta_rule import delta_rule, delta_rule_reference
from thesean.kernels.diagonal_scan import diagonal_scan, diagonal_scan_reference
from thesean.kernels.linear_attention import linear_attention, linear_attention_reference
from thesean.passes.graph.opaque_memories import GATED_DELTA_RULE, MEMORIES, SELECTIVE_SCAN, STATE_SPACE

KERNELS: dict[Any, tuple[Any, Any]] = {
    GATED_DELTA_RULE: (delta_rule, delta_rule_reference),
    STATE_SPACE: (linear_attention, linear_attention_reference),
    SELECTIVE_SCAN: (diagonal_scan, diagonal_scan_reference),
}
EVERY = pytest.mark.parametrize("operator", KERNELS, ids=lambda operator: operator._opname)


def inputs(operator: Any, steps: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, steps, 3, width, generator=made, dtype=dtype) for width in (4, 4, 5))
    rates = [torch.rand(2, steps, 3, generator=made, dtype=dtype)]
    if operator is GATED_DELTA_RULE:
        rates.insert(0, torch.rand(2, steps, 3, generator=made, dtype=dtype))
    if operator is SELECTIVE_SCAN:
        rates = [torch.rand(2, steps, 3, 4, generator=made, dtype=dtype)]
    return [query, key / key.norm(dim=-1, keepdim=True), value, *rates[:-1], -rates[-1]]


def zeros() -> torch.Tensor:
    return torch.zeros(2, 3, 4, 5, dtype=torch.float64)


def test_each_is_tested_here():
    assert MEMORIES.keys() == KERNELS.keys()


@EVERY
def test_it_is_the_recurrence_from_zeros(operator: Any):
    given = inputs(operator, 70)
    want, _ = KERNELS[operator][1](*given, zeros())
    torch.testing.assert_close(operator(*given), want)


def test_a_delta_rule_may_have_a_decay_for_each_feature():
    query, key, value, beta, decay = inputs(GATED_DELTA_RULE, 70)
    decays = torch.stack([decay * factor for factor in (0.1, 1.0, 0.5, 2.0)], -1)
    want, _ = delta_rule_reference(query, key, value, beta, decays, zeros())
    torch.testing.assert_close(GATED_DELTA_RULE(query, key, value, beta, decays), want)


@EVERY
def test_gradients_are_those_of_the_kernel(operator: Any):
    mine, theirs = ([x.requires_grad_() for x in inputs(operator, 9)] for _ in range(2))
    operator(*mine).square().sum().backward()
    KERNELS[operator][0](*theirs, zeros())[0].square().sum().backward()
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@EVERY
def test_what_needs_no_gradient_gets_none(operator: Any):
    query, key, value, *rates = inputs(operator, 5)
    operator(query, key, value.requires_grad_(), *rates).sum().backward()
    assert value.grad is not None
    assert query.grad is None


@EVERY
def test_half_precision_comes_back_as_it_went_in(operator: Any):
    given = inputs(operator, 9, torch.float32)
    out = operator(*(x.bfloat16() for x in given))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), operator(*given), rtol=0.1, atol=0.1)


@EVERY
def test_any_length_is_traced_as_one_operator_and_runs_at_others(operator: Any):
    class Rule(nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return operator(*given)

    given = inputs(operator, 7)
    free = tuple({1: torch.export.Dim.DYNAMIC} for _ in given)
    traced = torch.export.export(Rule(), tuple(given), dynamic_shapes=(free,)).module()
    given = inputs(operator, 80)
    torch.testing.assert_close(traced(*given), operator(*given))
    assert len(list(traced.graph.find_nodes(op="call_function", target=operator))) == 1


@EVERY
def test_shapes_that_do_not_fit_are_told(operator: Any):
    query, key, value, *rates = inputs(operator, 5)
    with pytest.raises(ValueError, match="expected query"):
        operator(query, key, value, *rates[:-1], rates[-1][:, :3])
    with pytest.raises(ValueError, match="query, key and value of four dimensions, found 3, 4, 4"):
        operator(query[0], key, value, *rates)


@EVERY
def test_its_work_is_counted(operator: Any):
    given = inputs(operator, 7)
    with FlopCounterMode(display=False) as counter:
        operator(*given)
    each = 2 if operator is STATE_SPACE else 3
    assert counter.get_total_flops() == 2 * each * (2 * 7 * 3 * 4) * 5
