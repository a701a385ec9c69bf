"""Commands that change nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import thesean
from tests.cli.test_app import error_of, guides, run
from thesean.report import Row, write_report

__all__ = ["guides"]  # a fixture


def test_targets_tells_the_options_of_one_family() -> None:
    result = run("targets", "linear-attention")
    assert result.exit_code == 0, result.output
    assert "linear-attention: gated, normalised" in result.output
    assert "replaces: mixing" in result.output
    assert "tuple[float, float] | None" in " ".join(result.output.split())
    for option in ("window", "kv_heads", "memory", "sharpness"):
        assert f"\n{option}" in result.output
    assert "did you mean 'gru'" in error_of(run("targets", "gruu"))


def test_measures_lists_every_measure_with_its_summary() -> None:
    result = run("measures")
    assert result.exit_code == 0, result.output
    for name in thesean.measures():
        assert f"\n{name} " in result.output


def test_a_saved_conversion_tells_its_plan_and_report_without_its_weights(guides: Path) -> None:
    words = "convert guides_for_cli:toy --data guides_for_cli:vectors -t mlp --granularity finest --parts layer"
    assert run(*words.split(), "--recipe", "fast", "--out", "saved", "--quiet").exit_code == 0
    (guides / "saved" / "weights.safetensors").unlink()
    result = run("report", "saved")
    assert result.exit_code == 0, result.output
    assert "1 of 1 parts replaced" in result.stdout
    assert "converted: divergence" in result.stdout
    (guides / "saved" / "report.json").write_text("{")
    assert "report.json can't be read" in error_of(run("report", "saved"))
    assert "expected a report.json of several models" in error_of(run("report", "saved", "--markdown"))
    assert "is missing" in error_of(run("report", guides))


def test_a_report_of_several_models_is_a_table_and_markdown(guides: Path) -> None:
    write_report("report.json", [Row(name="guide", loss=1.0), Row(name="converted", loss=1.5, params=3000)])
    result = run("report", "report.json")
    assert result.exit_code == 0, result.output
    assert "3 k" in result.stdout
    assert "| parameters | - | 3 k |" in run("report", "report.json", "--markdown").stdout


def test_bench_hands_its_words_to_the_suite_of_the_checkout() -> None:
    result = run("bench", "--list")
    assert result.exit_code == 0, result.output
    assert "latency" in result.output


def test_bench_without_a_checkout_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(thesean, "__file__", str(tmp_path / "site-packages" / "thesean" / "__init__.py"))
    assert "come with a checkout of the source" in error_of(run("bench", "--list"))


def test_a_png_without_matplotlib_stops_before_the_guide_is_loaded(
    guides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = error_of(run("plan", "guides_for_cli:broken", "--draw", "plan.png"))
    assert "matplotlib is not installed" in message
    assert "[report]" in message


def test_plan_hands_every_choice_to_thesean_plan(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def plan(model: object, **arguments: object) -> str:
        seen.update(arguments)
        return "planned"

    monkeypatch.setattr(thesean, "plan", plan)
    words = "plan guides_for_cli:toy -t auto --data guides_for_cli:batches --loss guides_for_cli:loss --seed 7"
    words += " --eval-data guides_for_cli:batches --recipe fast --constraint params=9 --context 8"
    words += " --dump-graphs graphs"
    result = run(*words.split())
    assert result.exit_code == 0, result.output
    assert seen["loss"] is sys.modules["guides_for_cli"].loss
    assert len(seen["eval_data"]) == 4  # type: ignore[arg-type]
    rest = {key: seen[key] for key in ("target", "seed", "recipe", "constraints", "context", "dump_graphs")}
    wanted = dict(target="auto", seed=7, recipe="fast", constraints={"params": 9}, context=(8,))
    assert rest == {**wanted, "dump_graphs": Path("graphs")}


def test_a_page_compares_with_the_guide_that_is_given(guides: Path) -> None:
    words = "convert guides_for_cli:toy --data guides_for_cli:vectors -t mlp --granularity finest --parts layer"
    assert run(*words.split(), "--recipe", "fast", "--out", "saved", "--quiet").exit_code == 0
    words = "report saved --html page.html --data guides_for_cli:vectors"
    assert run(*words.split()).exit_code == 0
    assert "doesn&#x27;t hold it" in (guides / "page.html").read_text()
    result = run(*words.split(), "--guide", "guides_for_cli:toy")
    assert result.exit_code == 0, result.output
    assert "Of 48 examples" in (guides / "page.html").read_text()
    assert "--guide is for the page" in error_of(run("report", "saved", "--guide", "guides_for_cli:toy"))


def test_a_saved_conversion_becomes_a_page(tmp_path: Path) -> None:
    saved = Path(__file__).parents[1] / "formats" / "v1" / "conversions" / "gru"
    result = run("report", str(saved), "--html", str(tmp_path / "report.html"))
    assert result.exit_code == 0, result.output
    assert "became gru" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.json").write_text("{}")
    told = error_of(run("report", str(tmp_path / "report.json"), "--html", str(tmp_path / "other.html")))
    assert "expected the folder of a saved conversion" in told
    assert not (tmp_path / "other.html").exists()
