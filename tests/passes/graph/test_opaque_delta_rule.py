"""B batch, T time, H heads, F width of queries and keys, K width of values"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from thesean.kernels.delta_rule import delta_rule, delta_rule_reference
from thesean.passes.graph.opaque_delta_rule import GATED_DELTA_RULE


def inputs(steps: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, steps, 3, width, generator=made, dtype=dtype) for width in (4, 4, 5))
    beta, decay = (torch.rand(2, steps, 3, generator=made, dtype=dtype) for _ in range(2))
    return [query, key / key.norm(dim=-1, keepdim=True), value, beta, -decay]


def zeros() -> torch.Tensor:
    return torch.zeros(2, 3, 4, 5, dtype=torch.float64)


def test_it_is_the_recurrence_from_zeros():
    given = inputs(70)
    want, _ = delta_rule_reference(*given, zeros())  # type: ignore[call-arg]
    torch.testing.assert_close(GATED_DELTA_RULE(*given), want)


def test_gradients_are_those_of_the_kernel():
    mine, theirs = ([x.requires_grad_() for x in inputs(9)] for _ in range(2))
    GATED_DELTA_RULE(*mine).square().sum().backward()
    delta_rule(*theirs, zeros())[0].square().sum().backward()  # type: ignore[arg-type,call-arg]
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_what_needs_no_gradient_gets_none():
    query, key, value, beta, decay = inputs(5)
    GATED_DELTA_RULE(query, key, value.requires_grad_(), beta, decay).sum().backward()
    assert value.grad is not None
    assert query.grad is None


def test_half_precision_comes_back_as_it_went_in():
    given = inputs(9, torch.float32)
    out = GATED_DELTA_RULE(*(x.bfloat16() for x in given))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), GATED_DELTA_RULE(*given), rtol=0.1, atol=0.1)


def test_any_length_is_traced_as_one_operator_and_runs_at_others():
    class Rule(nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return GATED_DELTA_RULE(*given)

    free = tuple({1: torch.export.Dim.DYNAMIC} for _ in range(5))
    traced = torch.export.export(Rule(), tuple(inputs(7)), dynamic_shapes=(free,)).module()
    given = inputs(80)
    torch.testing.assert_close(traced(*given), GATED_DELTA_RULE(*given))
    assert len(list(traced.graph.find_nodes(op="call_function", target=GATED_DELTA_RULE))) == 1


def test_shapes_that_do_not_fit_are_told():
    query, key, value, beta, decay = inputs(5)
    with pytest.raises(ValueError, match="delta_rule: expected query and key"):
        GATED_DELTA_RULE(query, key, value, beta[:, :3], decay)
    with pytest.raises(ValueError, match="expected four dimensions, found 3 and 4"):
        GATED_DELTA_RULE(query[0], key, value, beta, decay)


def test_its_work_is_counted():
    with FlopCounterMode(display=False) as counter:
        GATED_DELTA_RULE(*inputs(7))
    assert counter.get_total_flops() == 2 * 3 * (2 * 7 * 3 * 4) * 5
