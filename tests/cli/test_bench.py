"""`thesean bench` of one's own networks, and when it is the suite's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import thesean
from tests.cli.test_app import error_of, guides, run
from tests.report.points import FOUND
from thesean.choose.choose import UNMET
from thesean.cli import suite

__all__ = ["guides"]  # a fixture

MODEL = ("bench", "guides_for_cli:gpt", "--data", "guides_for_cli:batches")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `thesean.trade_offs` is asked for; nothing is measured."""
    pytest.importorskip("onnxruntime")
    seen: dict[str, Any] = {}

    def trade_offs(networks: Any, **rest: Any) -> thesean.TradeOffs:
        seen.update(rest, networks=networks)
        return FOUND

    monkeypatch.setattr(thesean, "trade_offs", trade_offs)
    return seen


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How `thesean.compile` is called; nothing is converted."""
    calls: list[dict[str, Any]] = []

    def compile(model: Any, **rest: Any) -> SimpleNamespace:
        calls.append(rest)
        return SimpleNamespace(frontier=f"frontier {len(calls)}")

    monkeypatch.setattr(thesean, "compile", compile)
    return calls


@pytest.fixture
def suite_of(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the suite is handed."""
    seen: list[list[str]] = []

    def main(words: list[str], program: str) -> int:
        seen.append(words)
        return 0

    monkeypatch.setitem(sys.modules, "benchmarks.__main__", SimpleNamespace(main=main))
    return seen


def test_a_model_is_converted_judged_on_what_is_held_out_drawn_and_kept(guides: Path) -> None:
    pytest.importorskip("onnxruntime")
    words = "bench guides_for_cli:toy --data guides_for_cli:vectors -t mlp --granularity finest --parts layer"
    words += " --recipe fast --batches 1 --quantize none --repeats 1 --out out -q"
    result = run(*words.split())
    assert result.exit_code == 0, result.output
    assert "guide" in result.stdout
    assert "no eval_data given" in result.stdout
    found = thesean.TradeOffs.from_json("out/trade_offs.json")
    assert [p.name for p in found] == ["guide", "converted"]
    assert (guides / "out" / "trade_offs.svg").read_text().startswith("<svg")
    assert thesean.load("out/mlp").plan.replaced
    html = run("report", "out/mlp", "--html", "page.html", "--trade-offs", "out/trade_offs.json")
    assert html.exit_code == 0, html.output
    assert "Pareto front" in (guides / "page.html").read_text()


def test_a_folder_is_read_beside_its_guide(guides: Path, asked: dict[str, Any]) -> None:
    Path("run/converted").mkdir(parents=True)
    Path("run/converted/graph.json").write_text("{}")
    told = error_of(run("bench", "run", "--data", "guides_for_cli:batches"))
    assert "give --guide too, or the model in place of the folder" in told
    words = "bench run --guide guides_for_cli:gpt --data guides_for_cli:batches --loss guides_for_cli:loss"
    result = run(*words.split(), "--lengths", "8,16", "--batches", "2", "--quantize", "int8,int4")
    assert result.exit_code == 0, result.output
    assert asked["networks"] == "run"
    assert type(asked["guide"]).__name__ == "GPT2LMHeadModel"
    assert len(asked["data"]) == 4
    assert asked["loss"] is sys.modules["guides_for_cli"].loss
    wanted = {k: asked[k] for k in ("lengths", "batches", "quantize")}
    assert wanted == {"lengths": (8, 16), "batches": (2,), "quantize": (None, "int8", "int4")}
    told = error_of(run(*words.split(), "--speedup", "1.5"))
    assert "--speedup is for converting, and run is converted" in told


@pytest.mark.filterwarnings("default:--speedup 9")  # a line on stderr
def test_budgets_are_planned_at_once_and_those_that_are_met_converted(
    guides: Path, asked: dict[str, Any], conversions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    notes = {1.25: (), 9.0: (f"{UNMET} (9 times): the nearest one found has 2 ms",)}

    def plan(model: Any, target: str, **rest: Any) -> list[Any]:
        seen.update(rest, target=target)
        return [SimpleNamespace(notes=notes[c["speedup"]], replaced=("a part",)) for c in rest["constraints"]]

    monkeypatch.setattr(thesean, "plan", plan)
    result = run(*MODEL, "--speedup", "1.25", "--speedup", "9", "--at", "64", "--candidate", "identity", "-q")
    assert result.exit_code == 0, result.output
    assert seen["target"] == "auto"
    assert seen["constraints"] == [{"speedup": 1.25, "context": 64}, {"speedup": 9.0, "context": 64}]
    assert seen["candidates"] == ["identity"]
    assert [set(call) & {"plan", "target"} for call in conversions] == [{"plan"}]
    assert "warning: --speedup 9 is left out: the constraints can't be met" in result.stderr
    assert asked["networks"] is not None

    conversions.clear()
    result = run(*MODEL, "-t", "gru", "--speedup", "1.25", "-q")
    assert result.exit_code == 0, result.output
    assert list(asked["networks"]) == ["gru", "auto 1.25x"]
    assert asked["networks"]["gru"] == "frontier 1"
    assert [call.get("target") for call in conversions] == ["gru", None]

    told = error_of(run(*MODEL, "--speedup", "9", "-q"))
    assert "the nearest one found has 2 ms. Give other budgets." in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--speedup", "1"], "--speedup 1: expected a number above 1"),
        (["--at", "8"], "--at and --candidate belong to --speedup"),
        (["--quantize", "int9"], "expected int8, int8-static, int4, or none alone; found 'int9'"),
        (["--lengths", "8,x"], "--lengths '8,x': expected whole numbers"),
        (["--guide", "guides_for_cli:gpt"], "is no saved conversion but a model itself"),
    ],
)
def test_a_wrong_word_stops_before_the_model_is_loaded(guides: Path, words: list[str], told: str) -> None:
    pytest.importorskip("onnxruntime")
    assert told in error_of(run("bench", "guides_for_cli:broken", *words))


def test_without_scipy_budgets_stop_before_the_model_is_loaded(guides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("thesean.choose.solve.find_spec", lambda name: None)
    assert "scipy is not installed" in error_of(run("bench", "guides_for_cli:broken", "--speedup", "2"))


def test_other_words_are_the_suites_as_they_are(guides: Path, suite_of: list[list[str]]) -> None:
    for words in (["--list"], [], ["latency", "--quick"], ["--quick", "--out", ".", "latency"], ["--only", "a:b"]):
        assert run("bench", *words).exit_code == 0
        assert suite_of.pop() == words
    Path("latency").mkdir()
    assert run("bench", "latency").exit_code == 0  # a folder that holds no network
    assert suite_of.pop() == ["latency"]


def test_a_word_that_is_neither_or_both_is_told(guides: Path, suite_of: list[list[str]]) -> None:
    told = error_of(run("bench", "latencyy"))
    assert "expected the folder of a saved conversion, a model" in told
    assert "did you mean 'latency'?" in told
    assert "found options alone" in error_of(run("bench", "--lengths", "8"))
    Path("latency").mkdir()
    Path("latency/config.json").write_text("{}")
    assert "write ./latency for the folder" in error_of(run("bench", "latency"))
    assert not suite_of
    assert suite.names_network("./latency")
