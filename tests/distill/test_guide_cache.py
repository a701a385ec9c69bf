"""What the guide makes of batches that come again is computed once, and nothing else changes by it.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader

import thesean
from tests import captured, models
from thesean.distill import guide_cache, saved_activations
from thesean.distill.guide_cache import GuideCache, key_of
from thesean.distill.saved_activations import SavedActivations
from thesean.errors import ArtifactError, UnknownNameError, WriteError
from thesean.passes.capture.capture import capture
from thesean.passes.graph.intermediates import intermediates, names_of


class TwoOutputs(nn.Module):
    """x_BD -> a dict of a tensor and a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        for layer in self.layers:
            x = x + layer(x)
        return {"y": x, "both": (x, x * 2)}


X_BD = [models.vectors(3, 8, seed=seed) for seed in range(4)]


class Counted:
    """A run of the guide that tells how often it was."""

    def __init__(self, *names: str) -> None:
        self.module = intermediates(captured.mlp().graph_module, names)
        self.names, self.count = names_of(self.module), 0

    def __call__(self, **inputs: torch.Tensor) -> Any:
        self.count += 1
        return self.module(**inputs)


def cache(repeats: bool = True, **more: Any) -> GuideCache:
    return GuideCache(repeats, **more)


@torch.no_grad()
@pytest.mark.parametrize(("repeats", "runs"), [(True, 4), (False, 8)])
def test_of_a_list_a_batch_is_run_once_and_of_anything_else_until_it_came_again(repeats, runs):
    run, own = Counted("linear_1"), cache(repeats)
    known = own.runner(run, run.names)
    for _ in range(5):
        for x_BD in X_BD:
            for name, value in known(input=x_BD).items():
                assert torch.equal(value, run.module(input=x_BD)[name])
    assert run.count == runs
    assert (own.runs, own.spared) == (runs, 20 - runs)
    assert own.told.startswith(f"the guide was not run in {20 - runs} of 20 steps: ")


@torch.no_grad()
def test_what_was_kept_for_one_loss_serves_another_that_asks_for_no_more():
    own, more, fewer, others = cache(), Counted("linear", "linear_1"), Counted("linear_1"), Counted("relu")
    for run in (more, fewer, others, others):
        own.runner(run, run.names)(input=X_BD[0])
    assert (more.count, fewer.count, others.count) == (1, 0, 1)


@torch.no_grad()
def test_what_does_not_fit_is_run_each_time_and_what_was_kept_stays():
    run = Counted()
    own = cache(room=2 * run(input=X_BD[0])["output"].nbytes)
    known = own.runner(run, run.names)
    for _ in range(3):
        for x_BD in X_BD:
            known(input=x_BD)
    assert run.count == 1 + 4 + 2 * 2
    assert own.spared == 4


@torch.no_grad()
@pytest.mark.parametrize(("length", "looked_at"), [(4, 9), (None, 20)])
def test_batches_are_no_longer_looked_at_once_two_passes_went_by_and_none_came_again(monkeypatch, length, looked_at):
    asked: list[Any] = []

    def counted(inputs: Any) -> str:
        asked.append(inputs)
        return key_of(inputs)

    monkeypatch.setattr(guide_cache, "key_of", counted)
    run = Counted("linear_1")
    own = cache(repeats=False, length=length)
    known = own.runner(run, run.names)
    for seed in range(20):
        x_BD = models.vectors(3, 8, seed=100 + seed)
        assert torch.equal(known(input=x_BD)["linear_1"], run.module(input=x_BD)["linear_1"])
    assert (run.count, len(asked)) == (20, looked_at)
    assert own.in_vain is (length is not None)


@torch.no_grad()
def test_batches_that_come_in_one_order_are_looked_at_for_ever():
    run, own = Counted("linear_1"), cache(repeats=False, length=4)
    known = own.runner(run, run.names)
    for _ in range(9):
        for x_BD in X_BD:
            known(input=x_BD)
    assert (run.count, own.in_vain) == (8, False)


def test_batches_are_told_apart_by_values_shapes_names_and_precision():
    x_BD = X_BD[0]
    keys = [key_of({"x": x}) for x in (x_BD, x_BD + 1, x_BD.view(8, 3), x_BD.double())]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(key_of({"x": x_BD}))
    assert len(set(keys)) == 5
    assert key_of({"a": x_BD, "b": X_BD[1]}) == key_of({"b": X_BD[1], "a": x_BD})
    assert key_of({"a": x_BD, "b": X_BD[1]}) != key_of({"a": X_BD[1], "b": x_BD})


def conversion(cache: Any = "auto", data: Any = None, target: str = "rnn", **settings: Any) -> thesean.Converted:
    recipe = {"steps": 12, **settings}
    batches = models.token_batches() if data is None else data
    model = models.gpt2()
    return thesean.compile(model, target, data=batches, recipe=recipe, cache=cache, progress=False)


def same(one: thesean.Converted, other: thesean.Converted) -> bool:
    return models.same_state(one.module, models.state_of(other.module))


@pytest.mark.parametrize("schedule", ["independent", pytest.param("progressive", marks=pytest.mark.thorough)])
def test_a_conversion_has_the_same_bits_and_says_what_it_saved(schedule):
    alignment = {"schedule": schedule, "share": 0.5} if schedule == "progressive" else {"schedule": schedule}
    kept, anew = conversion(alignment=alignment), conversion("off", alignment=alignment)
    assert same(kept, anew)
    told = [n for n in kept.report.notes if n.startswith("the guide was not run in ")]
    assert len(told) == 1
    assert [n for n in kept.report.notes if n not in told] == list(anew.report.notes)


def test_a_loader_that_shuffles_rows_repeats_nothing_and_holds_nothing(monkeypatch):
    made: list[GuideCache] = []
    original = guide_cache.GuideCache.__init__

    def noted(self: GuideCache, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        made.append(self)

    monkeypatch.setattr(guide_cache.GuideCache, "__init__", noted)
    rows = [{"input_ids": ids_T} for batch in models.token_batches() for ids_T in batch["input_ids"]]
    loader: Any = DataLoader(rows, 2, shuffle=True, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    conversion(data=loader)
    (own,) = made
    assert own.runs
    assert own._bytes == own.spared == 0


def test_activations_that_were_saved_are_read_and_a_folder_grows(tmp_path):
    batches, folder = models.token_batches(), tmp_path / "activations"
    written = thesean.save_activations(models.gpt2(), folder, data=batches[:3])
    assert (written.batches, written.new) == (3, 3)
    written = thesean.save_activations(models.gpt2(), folder, data=batches)
    assert (written.batches, written.new) == (4, 1)
    assert written.bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    kept, anew = conversion(folder), conversion("off")
    assert same(kept, anew)
    (told,) = (n for n in kept.report.notes if n.startswith("the guide was not run in "))
    assert told == "the guide was not run in 12 of 12 steps: its activations were saved"


def test_output_of_any_form_is_saved(tmp_path):
    guide = models.seeded(TwoOutputs)
    data = [{"x": x_BD} for x_BD in X_BD]
    thesean.save_activations(guide, tmp_path / "saved", "mlp", data=data)
    found = capture(guide, data[0]).graph_module
    saved = SavedActivations(tmp_path / "saved", found)
    for inputs in data:
        wanted = found(**inputs)
        made = saved(key_of(inputs), ["output"])
        assert made is not None
        assert made["output"].keys() == wanted.keys()
        assert torch.equal(made["output"]["both"][1], wanted["both"][1])
    assert saved(key_of({"x": X_BD[0] + 1}), ["output"]) is None
    assert saved(key_of(data[0]), ["output", "another_node"]) is None


def test_activations_of_another_guide_and_what_are_none_are_refused(tmp_path):
    data, folder = models.token_batches(2), tmp_path / "saved"
    thesean.save_activations(models.gpt2(), folder, data=data)
    other = models.gpt2()
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(WriteError, match=r"these are another guide's activations\. Choose another folder"):
        thesean.save_activations(other, folder, data=data)
    thesean.save_activations(models.gpt2(), tmp_path / "few", data=data, keep=["transformer.h.1*"])
    with pytest.raises(WriteError, match="these are of other parts"):
        thesean.save_activations(models.gpt2(), tmp_path / "few", data=data)
    with pytest.raises(ArtifactError, match="these are another guide's activations, or its weights have changed"):
        thesean.compile(other, data=data, cache=folder, progress=False)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(WriteError, match="expected a new or empty folder, or one of activations"):
        thesean.save_activations(models.gpt2(), mine, data=data)
    for nothing in (mine, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="expected a folder of activations, as `thesean activations` writes it"):
            conversion(nothing)
    (torn, *_) = folder.glob("*.safetensors")
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=f"{torn.name}: .* Write it anew: thesean activations"):
        conversion(folder, data)
    with pytest.raises(UnknownNameError, match="granularity"):
        thesean.save_activations(models.gpt2(), folder, data=data, granularty="block")  # type: ignore[call-arg]


def test_what_was_cut_short_goes_on(tmp_path):
    class Cut:
        def __iter__(self) -> Iterator[Any]:
            yield models.token_batches()[0]
            raise KeyboardInterrupt

    example = models.token_batches()[0]
    with pytest.raises(KeyboardInterrupt):
        thesean.save_activations(models.gpt2(), tmp_path / "saved", data=Cut(), example_inputs=example)
    written = thesean.save_activations(models.gpt2(), tmp_path / "saved", data=models.token_batches())
    assert (written.batches, written.new) == (4, 3)


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
    folder, data = tmp_path / "saved", models.token_batches(2)
    thesean.save_activations(models.gpt2(), folder, data=data[:1])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(saved_activations, "save_file", full)
    with pytest.raises(WriteError, match="No space left on device"):
        thesean.save_activations(models.gpt2(), folder, data=data)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("wrong", [None, 3, "", True])
def test_what_is_no_cache_is_refused(wrong):
    with pytest.raises(thesean.TheseanError, match='cache: expected "auto", "off" or a folder of activations, found'):
        conversion(wrong)


def test_a_target_that_is_chosen_by_measurement_has_no_ends_to_write(tmp_path):
    with pytest.raises(thesean.TheseanError, match="target 'auto' has no parts before it has chosen: name the target"):
        thesean.save_activations(models.gpt2(), tmp_path / "activations", "auto", data=models.token_batches())
