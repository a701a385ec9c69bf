"""Softmax over the tokens with the highest scores so far.

B batch, T time, M kept tokens, H heads, G heads of keys and values, C width of queries and keys, X columns of a token
"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import GRADIENT, VALUE, relative_error
from thesean.kernels.kept_attention import BLOCK, LASTING, kept_attention, kept_attention_reference

BATCH, HEADS, WIDTH, COLUMNS = 2, 4, 3, 5


def inputs(
    time: int, kept: int, groups: int = HEADS, held: int = 0, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """query, new and kept tokens, of which the first `held` places are taken. Scores are quarters, many alike."""
    g = torch.Generator().manual_seed(100 * time + kept)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tokens = normal(BATCH, kept + time, groups, WIDTH + 1 + COLUMNS)
    tokens[..., WIDTH] = (4 * tokens[..., WIDTH]).round() / 4
    tokens[..., -1] = 1
    before = tokens[:, :kept].clone()
    before[:, held:] = 0
    return [x.to(dtype) for x in (normal(BATCH, time, HEADS, WIDTH), tokens[:, kept:], before)]


def test_three_tokens_worked_by_hand():
    query = torch.ones(1, 3, 1, 1)
    key = torch.tensor([2.0, 3.0, 5.0]).log()
    score = torch.tensor([1.0, 0.0, 1.5])
    value = torch.tensor([10.0, 20.0, 30.0])
    new = torch.stack([key, score, value, torch.ones(3)], -1).view(1, 3, 1, 4)
    sums, top, kept = kept_attention(query, new, torch.zeros(1, 2, 1, 4))
    sums = sums * top.exp().unsqueeze(-1)
    # as many as stay at most: the second has faded when it comes, and the first when the third takes its place
    expected = torch.tensor([[20.0, 2.0], [20.0, 2.0], [75.0, 2.5]])
    torch.testing.assert_close(sums.view(3, 2), expected)
    assert torch.equal(kept[:, :, 0, 2], torch.tensor([[10.0, 30.0]]))


@pytest.mark.parametrize("fade", [0, 8])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("time", "kept", "held"), [(1, 4, 4), (7, 3, 2), (BLOCK, 5, 5), (150, 40, 3), (5, 70, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_equal_one_token_after_the_other(time, kept, held, groups, dtype, fade):
    given = [x.requires_grad_() for x in inputs(time, kept, groups, held, dtype)]
    exact = [x.detach().double().requires_grad_() for x in given]
    found, expected = kept_attention(*given, fade=fade), kept_attention_reference(*exact, fade=fade)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < VALUE[dtype]
    for sums, *_ in (found, expected):  # what they are below is no part of the mean
        (sums[..., :-1] / sums[..., -1:]).square().sum().backward()
    for x, reference in zip(given, exact, strict=True):
        wanted = torch.zeros_like(reference) if reference.grad is None else reference.grad
        error = (x.grad.double() - wanted).norm()
        assert error <= GRADIENT[dtype] * wanted.norm() + VALUE[dtype]  # of one token alone the mean is its value


@pytest.mark.parametrize("fade", [0, 4])
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 13], [19, 1]])
def test_chunks_equal_the_whole(chunks, fade):
    query, new, before = inputs(20, 6, held=2)
    new[:, 3, :, WIDTH] = new[:, 3, :, WIDTH].abs() + LASTING
    whole = kept_attention(query, new, before, fade=fade)
    kept, sums = before, []
    for each_query, each_new in zip(query.split(chunks, 1), new.split(chunks, 1), strict=True):
        part, _, kept = kept_attention(each_query, each_new, kept, fade=fade)
        sums.append(part)
    torch.testing.assert_close(torch.cat(sums, 1), whole[0])
    assert torch.equal(kept, whole[2])


def test_a_score_that_falls_is_outlived_by_a_lower_one_that_came_later():
    """And one that lasts is not, however many come."""
    score = torch.tensor([LASTING, 3.0, *[2.0] * 10])
    new = torch.stack([torch.zeros(12), score, torch.arange(12.0), torch.ones(12)], -1).view(1, 12, 1, 4)
    before, query = torch.zeros(1, 3, 1, 4), torch.zeros(1, 12, 1, 1)
    assert kept_attention(query, new, before)[2][..., 2].flatten().tolist() == [0, 1, 2]  # of equals the earlier
    *_, kept = kept_attention(query, new, before, fade=2)
    assert kept[..., 2].flatten().tolist() == [0, 10, 11]
    assert kept[..., 1].flatten().tolist() == [LASTING, 1.5, 2.0]
    # the second is worth two tokens more than those after it
    assert kept_attention(query[:, :4], new[:, :4], before, fade=2)[2][..., 2].flatten().tolist() == [0, 1, 3]


def test_at_any_length_what_is_left_of_a_score_is_exact():
    row = torch.tensor([0.0, 7.0, 1.0, 1.0])
    new = row.repeat(40_000, 1).view(1, -1, 1, 4)
    *_, kept = kept_attention(torch.zeros(1, 40_000, 1, 1), new, torch.zeros(1, 3, 1, 4), fade=64)
    assert kept[..., 1].flatten().tolist() == [7 - 2 * 2**-6, 7 - 2**-6, 7]


@pytest.mark.parametrize("fade", [0, 8])
def test_a_step_without_a_token_changes_nothing(fade):
    query, new, before = inputs(9, 4, held=2)
    new[:, 4:6] = 0
    rest = [t for t in range(9) if t not in (4, 5)]
    whole = kept_attention(query, new, before, fade=fade)
    alone = kept_attention(query[:, rest], new[:, rest], before, fade=fade)
    torch.testing.assert_close(whole[0][:, rest], alone[0])
    assert torch.equal(whole[2], alone[2])


def test_nothing_kept_adds_nothing():
    query, new, before = inputs(3, 4)
    sums, top, kept = kept_attention(query, torch.zeros_like(new), before)
    assert not sums.any()
    assert bool(top.isfinite().all())
    assert not kept.any()


def test_half_precision_is_computed_in_float32():
    given = inputs(20, 6, held=2, dtype=torch.bfloat16)
    found = kept_attention(*given)
    expected = kept_attention(*(x.float() for x in given))
    assert (found[0].dtype, found[2].dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2].float(), expected[2])


@pytest.mark.parametrize(("at", "shape"), [(0, (2, 0, 4, 3)), (1, (2, 5, 3, 9)), (2, (2, 0, 4, 9)), (2, (1, 6, 4, 9))])
def test_shapes_that_do_not_fit_are_refused(at, shape):
    given = inputs(5, 6)
    given[at] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="kept_attention: expected"):
        kept_attention(*given)
