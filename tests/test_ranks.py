"""A conversion in several processes is the one that a single process makes of the same batches."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import thesean
from tests.launched import ROOT, ended, environment, launch
from tests.rank_cases import CASES, INTERRUPTED, LOST, SHARDED, SPREAD, batches, deadly, guide, result, stopped
from thesean import exchange, ranks
from thesean.distill import scaling
from thesean.errors import MissingExtraError, RankError

NEAR = 1e-5  # what the rows of all ranks come to in another order of summation

accelerated = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Accelerate is not installed")


def check_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=NEAR, msg=name)
    for figures in ("losses", "held out", "stages", "final"):
        assert found[figures] == pytest.approx(expected[figures], rel=0, abs=NEAR), figures


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """A folder of what two processes found, and how they ended: the second is killed in the midst of a last run."""
    folder = tmp_path_factory.mktemp("two")
    return folder, ended(launch(2, ["-m", "tests.rank_cases", str(folder), "killed", *CASES]))


@pytest.fixture(scope="module")
def found(two: tuple[Path, list[tuple[int, str]]]) -> list[dict[str, Any]]:
    folder, ends = two
    assert all((folder / f"found.{rank}").is_file() for rank in range(2)), ends
    return [torch.load(folder / f"found.{rank}") for rank in range(2)]


@accelerated
@pytest.mark.parametrize("name", CASES)
def test_two_processes_come_to_what_one_does(found: list[dict[str, Any]], name: str) -> None:
    expected = result(name)
    assert not any("fine-tune did not help" in note for note in expected["notes"])  # what is compared was trained
    for own in found:
        check_alike(own[name], expected)


@accelerated
def test_ranks_that_were_given_different_things_say_so(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["other seeds"].startswith("RankError: rank 1 and rank 0 were given different things: the seed")
        assert "given different things: the data" in own["other order"]


@accelerated
def test_a_batch_of_fewer_rows_than_processes_is_refused(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["one row"].startswith("DataError: a batch of 1 rows can't be shared by 2 processes")


@accelerated
def test_a_killed_rank_ends_the_run_and_one_process_goes_on_from_there(two: tuple[Path, list[tuple[int, str]]]) -> None:
    folder, ((code, said), (signalled, _)) = two
    assert (code, signalled) == (LOST, -signal.SIGKILL), said[-2000:]
    assert said.count("another process of this run is gone") == 1
    resumed = result(INTERRUPTED, loss=deadly(1, 0), workdir=folder / "run", resume="must")
    assert any("went on at step 3 of fine-tune 1" in note for note in resumed["notes"])
    check_alike(resumed, result(INTERRUPTED, loss=deadly(1, 0)))


@accelerated
def test_what_a_rank_sends_is_what_the_formulas_say(found: list[dict[str, Any]]) -> None:
    guide = 3 * 72 + 45
    sizes = scaling.Sizes(
        guide=guide, parts=3, replaced=72, replacement=122, features=6, outputs=8, width=8, vocabulary=5, itemsize=8
    )
    for own in found:
        sent = own["cka, joint"]["sent"]
        # six steps of alignment, six of fine-tuning
        steps = 6 * scaling.gradients_given(sizes, sizes.new) + 6 * scaling.gradients_given(sizes, sizes.hybrid)
        assert sent["gradients"] == steps
        # solved anew at steps 2, 4 and 6
        assert sent["statistics"] == 3 * scaling.statistics_given(sizes)
        # exits count in fine-tuning too, to its end, for its batches come again; four times the last one is looked at,
        # held out
        assert sent["exits"] == (12 + 4 / 3) * scaling.exits_given(sizes, tokens=8)
        # without a loss or with ours no output is sent; with one of the user's the guide's, where it is tried and where
        # it is judged, and each hybrid's, held out
        assert "outputs" not in sent
        assert "outputs" not in own["our own loss"]["sent"]
        assert own["closed form"]["sent"]["outputs"] == 5 * scaling.outputs_given(sizes, tokens=8)


@accelerated
def test_ranks_that_have_parts_of_their_own_send_no_gradients(found: list[dict[str, Any]]) -> None:
    sizes = scaling.Sizes(
        guide=0, parts=3, replaced=72, replacement=122, features=6, outputs=8, width=8, vocabulary=5, itemsize=8
    )
    for rank, own in enumerate(found):
        rows, parts, ends = (6, 1, 3) if rank == 0 else (7, 2, 2)  # ends: of two parts, of which one begins as one ends
        sent = own["cka, independent"]["sent"]
        assert sent["gradients"] == 6 * scaling.gradients_given(sizes, 3 * 122 + 45)  # fine-tuning's
        assert sent["ends"] == 6 * scaling.ends_given(sizes, rows, 1) * ends / 2
        assert sent["results"] == 3 * scaling.results_given(sizes, parts)  # judged after steps 2, 4 and 6


@accelerated
@pytest.mark.parametrize("name", [SHARDED, SPREAD])
def test_a_run_of_two_processes_goes_on_in_one(two: tuple[Path, list[tuple[int, str]]], name: str) -> None:
    folder, _ = two
    resumed = result(name, workdir=folder / name, resume="must")
    assert any("went on at step 3 of align stage 1" in note for note in resumed["notes"])
    check_alike(resumed, result(name))


@accelerated
@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_and_then_in_four(tmp_path: Path) -> None:
    stopped(tmp_path, [SPREAD])  # of three parts: spread in two, on rows in four
    for count, way in ((2, "stopped"), (4, "resumed")):
        ends = ended(launch(count, ["-m", "tests.rank_cases", str(tmp_path), way, SPREAD]))
        assert [code for code, _ in ends] == [0] * count, ends
    expected = result(SPREAD)
    for rank in range(4):
        found = torch.load(tmp_path / f"found.{rank}")[SPREAD]
        assert any("went on at step 6 of align stage 1" in note for note in found["notes"])
        check_alike(found, expected)


@accelerated
def test_weights_in_slices_are_held_a_part_at_a_time(found: list[dict[str, Any]]) -> None:
    for own in found:
        most, total = own["held"]
        assert total == 8 * ((3 * 72 + 45) + (3 * 122 + 45))  # guide and hybrid, in double
        # a region of the hybrid has one part's
        assert most == 8 * 122
        # a step gathers the guide's weights once and the hybrid's twice; six times more they are whole
        gathered = (12 * (261 + 2 * 411) + 7 * (261 + 411)) * 8 / 2
        assert 0.8 * gathered < own[SHARDED]["sent"]["weights"] <= gathered


@accelerated
def test_half_precision_in_slices_is_the_same_to_the_last_bit(found: list[dict[str, Any]]) -> None:
    for own in found:
        whole, sliced = own["half"]
        assert all(torch.equal(sliced[name], value) for name, value in whole.items())


def test_without_accelerate_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"accelerate is not installed.*\[dist\]"):
        thesean.compile(guide(), "mlp", data=batches(), recipe="fast", progress=False)


@accelerated
@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_wraps_the_model_is_told_how_to_shard(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "true")
    with pytest.raises(RankError, match=r"Launch with --multi_gpu alone, and shard by the recipe: sharded: true"):
        thesean.compile(guide(), "mlp", data=batches(), recipe="fast", progress=False)


def test_a_process_by_itself_has_all_rows_and_sends_nothing() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    with ranks.joined(guide()):
        assert exchange.gather(x) is x
        assert ranks.own_rows(5) == slice(0, 5)
        assert ranks.sent() == {}


def launched(options: str, *arguments: str) -> str:
    """What is said on stdout under `accelerate launch`."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *arguments],
        env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@accelerated
@pytest.mark.slow
def test_the_command_line_in_four_processes_writes_and_speaks_once(tmp_path: Path) -> None:
    """By `accelerate launch`, which hands this on to torchrun."""
    _, target, given = CASES["cka, joint"]()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given["recipe"]))
    told = ["--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "made", "--workdir", tmp_path / "run"]
    command = "convert tests.rank_cases:guide --target mlp:width=6,hidden_norm=layer --data tests.rank_cases:batches"
    said = launched("--multi_gpu --num_processes 4 --num_machines 1 -m thesean", *command.split(), *map(str, told))
    assert said.count("saved ") == 1
    expected = thesean.compile(guide(), target, progress=False, **given).module.state_dict()
    for folder in (tmp_path / "made", tmp_path / "run" / "converted"):
        for name, value in thesean.load(folder).module.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=NEAR)
