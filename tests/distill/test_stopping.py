from __future__ import annotations

from thesean.distill.stopping import Plateau


def fed(plateau: Plateau, *losses: float) -> Plateau:
    for loss in losses:
        plateau.update(loss)
    return plateau


def make(patience=2, min_improvement=0.1, ceiling=0.01) -> Plateau:
    return Plateau(patience, min_improvement, ceiling)


def test_a_loss_that_falls_goes_on():
    plateau = fed(make(), 1.0, 0.8, 0.6, 0.4, 0.2)
    assert not plateau.done
    assert plateau.reason == "budget"
    assert plateau.best == 0.2


def test_patience_without_improvement_is_a_plateau():
    plateau = fed(make(), 1.0, 1.1)
    assert not plateau.done
    assert fed(plateau, 1.2).reason == "plateau"


def test_small_improvements_do_not_count_but_are_kept():
    plateau = fed(make(), 1.0, 0.95, 0.93)
    assert plateau.reason == "plateau"
    assert plateau.best == 0.93


def test_an_improvement_starts_the_patience_anew():
    assert not fed(make(), 1.0, 1.1, 0.8, 0.9).done


def test_the_ceiling_ends_a_stage_at_once():
    plateau = fed(make(), 0.01)
    assert plateau.done
    assert plateau.reason == "ceiling"


def test_a_loss_of_zero_under_no_ceiling_ends_too():
    assert fed(make(ceiling=0), 0.0).reason == "ceiling"


def test_update_tells_whether_a_loss_is_the_best():
    plateau = make()
    assert [plateau.update(v) for v in (1.0, 2.0, 0.5, 0.5)] == [True, False, True, False]


def test_not_a_number_is_no_improvement():
    plateau = fed(make(), float("nan"), float("nan"))
    assert plateau.best == float("inf")
    assert fed(make(), 1.0, float("nan"), float("nan")).reason == "plateau"


def test_what_was_waited_and_decided_comes_back():
    for losses, reason in (((1.0, 1.1), "budget"), ((1.0, 1.1, 1.1), "plateau"), ((0.001,), "ceiling")):
        before, again = fed(make(), *losses), make()
        again.load_state_dict(before.state_dict())
        assert again == before
        assert (again.reason, again.done) == (reason, reason != "budget")
        assert set(before.state_dict()) == {"best", "waited", "reason"}  # as earlier checkpoints have them
