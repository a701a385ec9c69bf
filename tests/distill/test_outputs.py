"""B batch, V classes"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models import vectors
from thesean.distill import outputs
from thesean.distill.outputs import _MASKED, Outputs, named_outputs, read_outputs
from thesean.errors import DataError, NumericalError, UnknownNameError
from thesean.similarity import get_measure

INTEGERS = torch.tensor([0, 2])


def kind(*observed, labels=(), **given):
    (found,) = read_outputs(observed, labels, given or None).kinds.values()
    return found


def distance(own, guide, how: Any, temperature=1.0):
    return Outputs(kinds={"output": how}).distance(own, guide, temperature)


@pytest.mark.parametrize("output", [torch.ones(2, dtype=torch.long), (), {"a": None}, torch.tensor(1.0)])
def test_outputs_with_nothing_to_match_are_refused(output):
    with pytest.raises(DataError, match="no floating-point tensor"):
        read_outputs([output])


def test_outputs_have_the_names_of_an_exported_file():
    a, b = vectors(2, 3), vectors(2, 4)
    assert list(named_outputs(a)) == ["output"]
    assert list(named_outputs((a, torch.ones(2, dtype=torch.long), b))) == ["output_0", "output_2"]
    assert list(named_outputs({"logits": a, "state": {"h": b, "all": [a]}})) == ["logits", "state.h", "state.all.0"]


def test_logits_are_told_by_their_name_their_labels_or_by_what_they_rule_out():
    x = vectors(2, 3)
    assert kind({"logits": x}) == kind({"policy_logits": x}) == "softmax"
    assert kind(x, labels=[INTEGERS]) == "softmax"
    assert kind(x.masked_fill(x == x.max(), -torch.inf)) == "softmax"
    assert kind(x, labels=[INTEGERS.float()]) == "mse"
    assert kind(x) == "mse"


def test_a_uniform_guess_is_among_the_most_classes_of_any_logits():
    two = {"logits": vectors(2, 3), "other_logits": vectors(2, 5), "values": vectors(2, 9)}
    assert read_outputs([two]).classes == 5
    assert read_outputs([vectors(2, 9)]).classes == 0


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_number_that_stands_for_minus_infinity_rules_out_as_well(low):
    x = vectors(4, 3)
    masked = x.masked_fill(x == x.max(-1, keepdim=True).values, low)
    found = read_outputs([masked, vectors(4, 3, seed=1).masked_fill(masked == low, low)])
    assert found.kinds == {"output": "softmax"}
    assert found.distance(masked, masked).item() == 0
    assert 0 < found.distance(masked.where(masked == low, masked * 2), masked).item() < 10
    prices = torch.stack([x[:, 0], low / 4 * (1 + x[:, 1].abs())], -1)  # a column of another scale
    assert kind(prices) == "mse"
    assert kind(masked.masked_fill(masked == low, 0.9 * _MASKED)) == "mse"  # large, and no mask
    assert kind(torch.cat([masked, torch.full((4, 1), -low / 50)], 1)) == "mse"  # beside others that are as large


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_logarithms_of_probabilities_are_compared_as_what_they_are(dtype):
    x = vectors(4, 6, 300).mul(3).to(dtype).log_softmax(-1)
    found = read_outputs([x, vectors(4, 6, 300, seed=1).mul(3).to(dtype).log_softmax(-1)])
    assert found.told == "outputs: output by softmax over 300 (log probabilities)"
    assert found.distance(x, x).item() == 0
    assert kind(x - 0.1) == kind(x * 1.1) == kind(-x) == "mse"


def test_one_logit_is_no_distribution():
    assert kind({"logits": vectors(2, 1)}) == kind({"logits": vectors(2)}) == "mse"
    assert kind(vectors(2, 1), labels=[INTEGERS]) == "mse"


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_labels_of_zero_and_one_for_each_value_make_it_a_logit_of_its_own(shape):
    on = (vectors(*shape, seed=1) > 0).float()
    assert kind(vectors(*shape), labels=[on]) == kind(vectors(*shape), labels=[on.long()]) == "sigmoid"
    assert kind(vectors(*shape), labels=[on + 0.5]) == "mse"


def test_what_never_varies_is_left_out_whatever_else_there_is():
    still, x, y = torch.full((2, 3), 7.0), vectors(2, 3), vectors(2, 3, seed=1)
    read = read_outputs(
        [{"x": x, "scale": torch.tensor(3.0), "table": still}, {"x": y, "scale": x[0, 0], "table": still}]
    )
    assert read.kinds == {"x": "mse", "scale": "ignore", "table": "ignore"}
    assert read.told == (
        "outputs: x by normalised MSE; scale ignored (one number for a whole batch); table ignored (constant)"
    )
    weights = vectors(3, 4)  # a parameter that is also an output: its rows differ, and it doesn't
    assert read_outputs([{"x": x, "w": weights}, {"x": y, "w": weights}]).kinds["w"] == "ignore"


def test_a_row_of_another_output_tells_whether_it_varies():
    x, table = vectors(4, 3), torch.full((4, 3), 7.0)
    few = {"x": vectors(1, 3, seed=1), "table": table[:1]}
    assert read_outputs([{"x": x, "table": table}, few]).kinds == {"x": "mse", "table": "ignore"}
    assert kind(x, vectors(2, 5)) == "mse"  # of another width: nothing can be said
    assert kind(table, table, x) == "mse"  # one run that differs is enough
    nothing = torch.full((4, 3), -torch.inf)
    assert read_outputs([{"x": x, "n": nothing}, {"x": x + 1, "n": nothing}]).kinds["n"] == "ignore"


def test_where_nothing_varies_all_is_matched_but_single_numbers():
    still = torch.full((2, 3), 7.0)
    read = read_outputs([{"x": still, "n": torch.tensor(1.0)}] * 2)
    assert read.kinds == {"x": "mse"}
    assert read.told == "outputs: x by normalised MSE (it didn't vary)"


def test_labels_are_those_of_the_first_output():
    read = read_outputs([{"policy": vectors(2, 3), "value": vectors(2, 4)}], [INTEGERS])
    assert read.kinds == {"policy": "softmax", "value": "mse"}
    assert read.told == "outputs: policy by softmax over 3; value by normalised MSE"


def test_the_user_overrules_and_is_told_so():
    observed = [{"policy": vectors(2, 3), "value": vectors(2, 1), "mask": vectors(2, 3, seed=1)}]
    read = read_outputs(observed, given={"policy": "softmax", "mask": "ignore"})
    assert read.kinds == {"policy": "softmax", "value": "mse", "mask": "ignore"}
    assert "policy by softmax over 3 (asked for)" in read.told
    told = read_outputs(observed, given={"policy": "sigmoid", "mask": "ignore"}).told
    assert told == "outputs: policy by sigmoid (asked for); value by normalised MSE; mask ignored (asked for)"
    with pytest.raises(DataError, match="the guide gives no 'polcy'; it gives: policy, value, mask"):
        read_outputs(observed, given={"polcy": "softmax"})
    with pytest.raises(UnknownNameError, match="unknown kind of output 'softmaks'; did you mean 'softmax'"):
        read_outputs(observed, given={"policy": "softmaks"})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="nothing to match"):
        read_outputs([vectors(2, 3)], given={"output": "ignore"})


@pytest.mark.parametrize("how", ["softmax", "sigmoid", "mse"])
def test_the_distance_of_equal_outputs_is_zero(how):
    x = vectors(4, 3)
    assert distance(x, x, how).item() == pytest.approx(0, abs=1e-6)


def test_divergences_have_the_values_worked_by_hand():
    guide, own = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distance(own, guide, "softmax").item() == pytest.approx(by_hand, rel=1e-5)
    # one logit of log 3 is the same distribution over two; the second one agrees
    assert distance(own, guide, "sigmoid").item() == pytest.approx(by_hand, rel=1e-5)
    assert distance(own[:, 0], guide[:, 0], "sigmoid").item() == pytest.approx(by_hand, rel=1e-5)


def test_the_other_divergences_are_the_measures_of_their_names():
    own, guide = vectors(6, 4), vectors(6, 4, seed=1)
    outputs = Outputs(kinds={"output": "softmax"})
    reverse = get_measure("kl").value(guide, own).item()
    assert outputs.distance(own, guide, by="reverse-kl").item() == pytest.approx(reverse, rel=1e-5)
    assert outputs.distance(own, guide, by="js").item() == pytest.approx(
        get_measure("js").value(own, guide).item(), rel=1e-5
    )
    kinds = Outputs(kinds={"output": "sigmoid"})
    pair = [torch.stack([z, torch.zeros_like(z)], -1) for z in (own, guide)]  # one logit is a softmax of two
    for by in ("kl", "reverse-kl", "js"):
        found, expected = kinds.distance(own, guide, by=by), outputs.distance(pair[0], pair[1], by=by)
        assert found.item() == pytest.approx(4 * expected.item(), rel=1e-5)  # summed over 4 classes


@pytest.mark.parametrize("by", ["kl", "reverse-kl", "js"])
def test_divergences_of_a_confident_network_and_of_ruled_out_classes_have_gradients(by):
    own = torch.tensor([[80.0, -80.0, 0.0], [0.0, 0.0, 5.0]], requires_grad=True)
    guide = torch.tensor([[-80.0, 80.0, 0.0], [1.0, 0.0, -torch.inf]])
    loss = Outputs(kinds={"output": "softmax"}).distance(own, guide, by=by)
    loss.backward()
    assert math.isfinite(loss.item())
    assert own.grad is not None
    assert own.grad.isfinite().all()
    assert own.grad[1, 2] == 0
    if by == "js":
        assert loss.item() <= math.log(2)


@pytest.mark.parametrize("how", ["softmax", "sigmoid"])
def test_a_temperature_scales_logits_and_gradients_back(how):
    own, guide = vectors(4, 3), vectors(4, 3, seed=1)
    cool = 4 * distance(own / 2, guide / 2, how).item()
    assert distance(own, guide, how, temperature=2.0).item() == pytest.approx(cool, rel=1e-5)


@pytest.mark.parametrize("how", ["softmax", "sigmoid", "mse"])
def test_positions_are_averaged(how):
    own, guide = vectors(4, 3), vectors(4, 3, seed=1)
    if how == "mse":  # the guide's mean is that of each position
        own, guide = own.repeat(2, 1), guide.repeat(2, 1)
        assert distance(own, guide, how).item() == pytest.approx(distance(own[:4], guide[:4], how).item(), rel=1e-5)
    else:
        flat = distance(own, guide, how).item()
        assert distance(own.view(2, 2, 3), guide.view(2, 2, 3), how).item() == pytest.approx(flat, rel=1e-6)


@pytest.mark.parametrize("how", ["softmax", "sigmoid", "mse"])
def test_half_precision_is_summed_in_single(how):
    own, guide = 30 * vectors(64, 5).half(), 30 * vectors(64, 5, seed=1).half()
    found = distance(own, guide, how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distance(own.float(), guide.float(), how))


@pytest.mark.parametrize("how", ["softmax", "sigmoid"])
def test_steps_that_are_not_seen_do_not_count(how):
    own, guide = vectors(2, 4, 3), vectors(2, 4, 3, seed=1)
    mask_BT = torch.tensor([[True, True, False, False], [False, True, True, True]])
    found = Outputs(kinds={"output": how}).distance(own, guide, masks={"output": mask_BT})
    torch.testing.assert_close(found, distance(own[mask_BT], guide[mask_BT], how))
    if how == "softmax":  # over the steps themselves, each row by itself
        found = Outputs(kinds={"output": how}).distance(own[..., 0], guide[..., 0], masks={"output": mask_BT})
        rows = [distance(o[m][None], g[m][None], how) for o, g, m in zip(own[..., 0], guide[..., 0], mask_BT)]
        torch.testing.assert_close(found, torch.stack(rows).mean())


def test_values_are_compared_in_units_of_the_guides_spread():
    guide = vectors(64, 3)
    mean = guide.mean(0, keepdim=True).expand_as(guide)
    assert distance(mean, guide, "mse").item() == pytest.approx(1, rel=1e-5)
    own = vectors(64, 3, seed=1)
    assert distance(own * 10, guide * 10, "mse").item() == pytest.approx(distance(own, guide, "mse").item(), rel=1e-5)
    assert math.isfinite(distance(vectors(4, 3), torch.ones(4, 3), "mse").item())


def test_outputs_count_alike_and_ignored_ones_not():
    a, b = vectors(8, 3), vectors(8, 2, seed=1)
    both = Outputs(kinds={"a": "mse", "b.0": "mse"}).distance({"a": a, "b": (b + 1,)}, {"a": a, "b": (b,)})
    alone = Outputs(kinds={"a": "ignore", "b.0": "mse"}).distance({"a": a, "b": (b + 1,)}, {"a": a, "b": (b,)})
    assert both.item() == pytest.approx(alone.item() / 2, rel=1e-5)
    assert alone.item() == pytest.approx(distance(b + 1, b, "mse").item(), rel=1e-6)


def test_classes_that_the_guide_rules_out_count_for_nothing():
    own, guide = vectors(4, 3).requires_grad_(), vectors(4, 4, seed=1)
    guide[:, 3] = -torch.inf
    for last in (torch.full((4, 1), -torch.inf), vectors(4, 1, seed=2)):
        loss = distance(torch.cat([own, last], 1), guide, "softmax")
        assert loss.item() == pytest.approx(distance(own, guide[:, :3], "softmax").item(), rel=1e-5)
        (grad,) = torch.autograd.grad(loss, own)
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


def test_only_minus_infinity_of_a_class_is_no_broken_number():
    masked = vectors(2, 3).masked_fill(vectors(2, 3) > 0, -torch.inf)
    Outputs(kinds={"output": "softmax"}).check_finite(masked, "batch 0")
    Outputs(kinds={"output": "ignore"}).check_finite(masked * torch.nan, "batch 0")
    broken: list[tuple[Any, torch.Tensor]] = [("mse", masked), ("softmax", -masked), ("softmax", masked * torch.nan)]
    for how, value in broken:
        with pytest.raises(NumericalError, match="batch 3: the guide's own output 'output' holds NaN or infinity"):
            Outputs(kinds={"output": how}).check_finite(value, "batch 3")


def test_only_divergences_are_in_nats():
    assert Outputs(kinds={"a": "softmax", "b": "sigmoid", "c": "ignore"}).in_nats
    assert not Outputs(kinds={"a": "softmax", "b": "mse"}).in_nats


def test_a_softmax_distance_is_torchs_own_divergence():
    own, guide = vectors(6, 5), vectors(6, 5, seed=1)
    theirs = F.kl_div(own.log_softmax(-1), guide.log_softmax(-1), log_target=True, reduction="batchmean")
    assert distance(own, guide, "softmax").item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "mse"])
def test_large_outputs_are_looked_at_in_pieces_and_give_the_same(kind, monkeypatch):
    own, guide = vectors(4, 6, 5), vectors(4, 6, 5, seed=1)
    whole, told = distance(own, guide, kind, 2.0), read_outputs([own, guide]).told
    monkeypatch.setattr(outputs, "_PIECE", 7)
    torch.testing.assert_close(distance(own, guide, kind, 2.0), whole)
    assert read_outputs([own, guide]).told == told
    constant = torch.ones(4, 6)
    assert read_outputs([{"x": own, "c": constant}, {"x": guide, "c": constant}]).kinds["c"] == "ignore"


def test_an_error_over_what_is_seen_is_worked_by_hand():
    """Steps seen by two rows, by one and by none: spreads of 2, 0 and nothing; each of three values is off by 1."""
    guide_BT1 = torch.tensor([[[2.0], [5.0], [9.0]], [[4.0], [7.0], [1.0]]])
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    own_BT1 = torch.where(mask_BT.unsqueeze(2), guide_BT1 + 1, 100.0)
    found = Outputs(kinds={"output": "mse"}).distance(own_BT1, guide_BT1, masks={"output": mask_BT})
    assert found.item() == pytest.approx(3 / 2)
    guide_BT1[0, 2] = torch.nan  # and what the guide doesn't say counts for nothing
    found = Outputs(kinds={"output": "mse"}).distance(own_BT1, guide_BT1, masks={"output": mask_BT})
    assert found.item() == pytest.approx(3 / 2)


def test_one_row_is_judged_by_the_variance_of_others():
    rows, off = vectors(64, 5), 0.1 * vectors(64, 5, seed=1)
    judge = read_outputs([rows[:32], rows[32:]])
    together = float(judge.distance(rows + off, rows))
    apart = [float(judge.distance(a, b)) for a, b in zip((rows + off).split(1), rows.split(1), strict=True)]
    assert sum(apart) / 64 == pytest.approx(together, rel=1e-4)
    steps, mask_BT = rows.view(1, 64, 5), torch.arange(64).view(1, 64) < 48
    judge = read_outputs([steps, steps[:, :40] + 1])  # lengths differ: from step to step
    found = float(judge.distance(steps + off.view(1, 64, 5), steps, masks={"output": mask_BT}))
    assert found == pytest.approx(float(off[:48].square().mean()) / judge.variances["output"], rel=1e-4)


@pytest.mark.parametrize("observed", [[torch.ones(1, 3)], [vectors(1, 3), vectors(1, 4)], [torch.ones(2, 1)]])
def test_what_tells_no_variance_has_none(observed):
    assert not read_outputs(observed).variances
