"""B batch, T time, H heads, C width of a head"""

from __future__ import annotations

import pytest
import torch

from thesean.targets.shared.head_norm import HeadNorm, HeadsNorm, RmsNorm, copy_norms, head_norms

WEIGHT_HC, BIAS_HC = torch.rand(4, 3) + 0.5, torch.rand(4, 3)


@pytest.mark.parametrize("shape", [(2, 5), (7,), ()])
@pytest.mark.parametrize("whole", [False, True])
def test_heads_are_normed_one_by_one_or_together_whatever_stands_before_them(shape, whole):
    x = torch.randn(*shape, 4, 3)
    norm = HeadNorm(WEIGHT_HC, 0.1, BIAS_HC, whole)
    square = x.square().mean((-2, -1) if whole else -1, keepdim=True)
    torch.testing.assert_close(norm.of(x), x / (square + 0.1).sqrt() * WEIGHT_HC + BIAS_HC)
    assert norm.of(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("norm", "groups", "weight_HC", "bias_HC"),
    [
        (HeadNorm(WEIGHT_HC, 0.1, BIAS_HC), 4, WEIGHT_HC, BIAS_HC),
        (HeadNorm(WEIGHT_HC[[0, 0, 1, 1]], 0.1, BIAS_HC[[0, 0, 1, 1]]), 2, WEIGHT_HC[:2], BIAS_HC[:2]),
        (HeadNorm(WEIGHT_HC[0], 0.1, BIAS_HC[0]), 2, WEIGHT_HC[[0, 0]], BIAS_HC[[0, 0]]),
        (HeadNorm(WEIGHT_HC, 0.1), 4, WEIGHT_HC, torch.zeros(4, 3)),
    ],
)
def test_a_module_takes_the_rows_of_its_heads_and_a_bias_or_none(norm, groups, weight_HC, bias_HC):
    module = HeadsNorm(groups, 3, 0.1, whole=False)
    module.bias_HC.data.fill_(7)
    module.copy_from(norm)
    assert torch.equal(module.weight_HC, weight_HC)
    assert torch.equal(module.bias_HC, bias_HC)
    x = torch.randn(2, groups, 3)
    torch.testing.assert_close(module(x), HeadNorm(weight_HC, 0.1, bias_HC).of(x))


@pytest.mark.parametrize("form", [None, "heads", "whole"])
def test_modules_of_query_and_key_are_of_the_form_that_is_asked_for(form):
    assert not len(head_norms(3, (4, 2), None, form))
    query, key = head_norms(3, (4, 2), [0.1, 0.2], form)
    assert [query.eps, key.eps] == [0.1, 0.2]
    if form is None:
        assert isinstance(query, RmsNorm)
        assert query.weight_C.shape == key.weight_C.shape == (3,)
    else:
        assert isinstance(query, HeadsNorm)
        assert (query.weight_HC.shape, key.weight_HC.shape) == ((4, 3), (2, 3))
        assert query.whole == key.whole == (form == "whole")


def test_norms_are_copied_in_their_order_and_none_to_none():
    modules = head_norms(3, (4, 4), [0.1, 0.1], None)
    copy_norms(modules, (HeadNorm(WEIGHT_HC[0], 0.1), HeadNorm(WEIGHT_HC[1], 0.1)))
    for module, row in zip(modules, WEIGHT_HC, strict=False):
        assert torch.equal(module.state_dict()["weight_C"], row)
    copy_norms(head_norms(3, (4, 4), None, None), None)


def test_some_heads_of_a_norm_are_its_rows_and_one_weight_for_all_stays():
    kept = HeadNorm(WEIGHT_HC, 0.1, BIAS_HC).heads(torch.tensor([2, 0]))
    assert torch.equal(kept.weight, WEIGHT_HC[[2, 0]])
    assert kept.bias is not None
    assert torch.equal(kept.bias, BIAS_HC[[2, 0]])
    simple = HeadNorm(WEIGHT_HC[0], 0.1)
    assert simple.heads(torch.tensor([2])) == simple
