"""What the study of the paper's matrix makes of its rows."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.paper.conversions import conversions
from benchmarks.paper.rows import CORE, GRID, Rates, every, untuned
from benchmarks.paper.tables import tables
from benchmarks.studies.matrix import CASE
from benchmarks.suite import Options, Run

MLP, TEXT = "convnet to MLP", "GPT-2 to Elman"


def row(name: str, accuracy: float, loss: float = 1.0, seed: int = 0, **more: Any) -> dict[str, Any]:
    told = {"conversion": name.split(":")[0], "stages": [], "stage_accuracies": [], "cpu_s": 2.0, "steps": 3}
    return {"name": name, "seed": seed, "accuracy": accuracy, "loss": loss, "validation": loss} | told | more


def written(*cases: dict[str, Any], left_out: int = 0) -> str:
    served = {"name": f"{MLP}: served", "conversion": MLP, "unit": "accuracy", "chance": 0.1}
    figures = {"guide": {"accuracy": 0.9}, "untrained": {"accuracy": 0.1}, "params": {"guide": 1, "converted": 2}}
    latency = {who: {"forward": {"median_ms": 1.0}} for who in ("guide", "converted")}
    details: dict[str, Any] = {"left_out": [{}] * left_out} if left_out else {}
    held = [served | figures | {"latency": latency}, *cases]
    return tables({"cases": held, "settings": CASE.settings, "seeds": [0, 1], "details": details})


def test_a_mean_has_its_range_and_what_is_missing_is_not_measured():
    told = written(row(f"{MLP}: default", 0.8), row(f"{MLP}: default", 0.9, seed=1), left_out=7)
    assert "| convnet to MLP, trained guide | 90.0 | 85.0 (80.0 to 90.0) | not measured | not measured |" in told
    assert "7 rows were not" in told
    assert "Not measured: deep to shallow convnet, trained guide; " in told
    assert "| GPT-2 to Elman, trained guide |" not in told


def test_a_default_behind_a_baseline_is_told():
    told = written(
        row(f"{MLP}: default", 0.8), row(f"{MLP}: scratch, rate 0.001", 0.85), row(f"{MLP}: paper", 0.7, seed=1)
    )
    assert "the default is ahead of paper by 10.0 points; **the default is behind scratch by 5.0 points**." in told
    text = written(row(f"{TEXT}: default", 0.5, 1.5), row(f"{TEXT}: scratch, rate 0.001", 0.4, 2.25))
    assert "GPT-2 to Elman, trained guide: the default is ahead of scratch by 0.750 nats." in text


def test_the_first_seed_of_a_tuned_method_is_the_rate_that_did_best_on_validation_data():
    tried = [
        row(f"{MLP}: scratch, rate {rate:g}", 0.1 * n, loss) for n, (rate, loss) in enumerate(zip(GRID, (2, 1, 3)))
    ]
    told = written(*tried, row(f"{MLP}: scratch", 0.3, 9, seed=1))
    assert "| convnet to MLP, trained guide | 90.0 | not measured | not measured | 20.0 (10.0 to 30.0) |" in told
    assert "| convnet to MLP, scratch | 2.0000 | **1.0000** | 3.0000 |" in told


def test_errors_and_networks_at_chance_are_told():
    failed = {"name": f"{MLP}: paper, rate 0.002", "seed": 0, "conversion": MLP, "failed": "NumericalError: it broke"}
    lost = row(f"{MLP}: default", 0.12)
    rose = row(f"{MLP}: paper, joint", 0.8, stage_accuracies=[0.7, 0.1], stages=[1, 2])
    told = written(failed, lost, rose)
    assert "- convnet to MLP: paper, rate 0.002, seed 0: NumericalError: it broke" in told
    assert "- convnet to MLP: default, seed 0: ends at chance, 12.0%." in told
    assert "paper, joint, seed 0: a hybrid is at chance, 10.0% right after stage 2 of 2; 80.0% at the end." in told


def test_every_row_comes_once_a_seed_and_variants_take_the_rate_of_their_conversion(tmp_path):
    run = Run("matrix", CASE, Options(out=tmp_path))
    assert Rates(run)(TEXT, "scratch") == GRID[1]
    run.rows.append(row(f"{TEXT}: scratch, rate {GRID[2]:g}", 0.4, 2.0))
    assert Rates(run)("GPT-2 to GRU", "scratch") == GRID[2]
    found = conversions(CASE.settings | CASE.quick)
    rows = [(r.name, seed) for r, seed in every(found, (0, 1), untuned)]
    names = {name for name, seed in rows if seed == 1}
    assert {f"{name}: {way}" for name in CORE for way in ("default", "scratch", "default, untrained guide")} <= names
    grid = {(f"{name}: paper, rate {rate:g}", 0) for name in CORE for rate in GRID}
    assert grid <= set(rows)


@pytest.mark.parametrize("name", CORE)
def test_every_conversion_has_a_guide_that_is_drawn_from_its_seed(name):
    conversion = conversions(CASE.settings | CASE.quick)[name]
    one, again, other = (conversion.guide(False, seed).state_dict() for seed in (1, 1, 2))
    assert all(one[key].equal(again[key]) for key in one)
    assert not all(one[key].equal(other[key]) for key in one)
