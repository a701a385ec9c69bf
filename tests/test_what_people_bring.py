"""Guides, batches and outputs as people have them, through `thesean.compile` whole.

B batch, T time, V vocabulary
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import models
from tests.models import tokens, vectors
from thesean.deploy.session import Session
from thesean.errors import ArtifactError, CaptureError, DataError, LostError, PlanError, TargetMismatchError

pytestmark = pytest.mark.thorough  # each idea has a test of its own beside its module

FEW = {"steps": 8, "warmup": 1}


class Cells(nn.Module):
    """A stem, three recurrent blocks with names that are no identifiers, and a head: x_BTD -> y_BTV."""

    def __init__(self, names: tuple[str, ...] = ("user id", "[cls]", "x")) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.by = nn.ModuleDict({name: nn.GRU(8, 8, batch_first=True) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in self.by:
            x = x + self.by[name](x)[0]
        return self.out(x)


def cells() -> Cells:
    guide = models.seeded(Cells)
    assert isinstance(guide, Cells)
    return guide


def windows(count: int = 9) -> list[torch.Tensor]:
    return [vectors(4, 7, 6, seed=k) for k in range(count)]


def convert(guide: nn.Module, target: str | thesean.Target = "mingru", data=None, **settings):
    return thesean.compile(guide, target, data=data or windows(), progress=False, **{"recipe": "fast", **settings})


@pytest.mark.parametrize(
    "names", [("user id", "[cls]", "x"), ("class", 'say "hi"', "back\\slash"), ("None", "ſelf", "__pre")]
)
def test_names_that_are_no_identifiers_survive_plan_yaml_folder_and_file(names, tmp_path):
    guide = models.seeded(Cells, names)
    plan = thesean.plan(guide, "mingru", data=windows())
    assert all(name in str(plan) for name in names)
    assert thesean.Plan.from_yaml(plan.to_yaml()) == plan
    converted = convert(guide, keep=[plan.parts[0].path])
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    assert torch.equal(loaded(windows()[0]), converted(windows()[0]))
    assert loaded.export(tmp_path / "m.onnx").checks


def test_what_the_guide_froze_is_neither_trained_nor_thawed(tmp_path):
    guide = cells()
    guide.stem.requires_grad_(False)
    converted = convert(guide, recipe=FEW)
    found = dict(converted.module.named_parameters())
    assert torch.equal(found["stem.weight"], guide.stem.weight)
    assert not found["stem.weight"].requires_grad
    assert not torch.equal(found["out.weight"], guide.out.weight)
    assert all(p.requires_grad for name, p in found.items() if not name.startswith("stem"))
    assert "frozen in the guide and left as they were (requires_grad=False): stem.weight, stem.bias" in (
        converted.report.notes
    )
    loaded = dict(thesean.load(converted.save(tmp_path / "saved")).module.named_parameters())
    assert {n for n, p in loaded.items() if not p.requires_grad} == {"stem.weight", "stem.bias"}


def test_a_guide_that_is_frozen_whole_keeps_all_but_the_new_parts():
    guide = cells().requires_grad_(False)
    converted = convert(guide, recipe=FEW)
    trained = {name for name, p in converted.module.named_parameters() if p.requires_grad}
    assert trained
    assert not trained & dict(guide.named_parameters()).keys()


def language_data(labels: bool) -> list[dict[str, torch.Tensor]]:
    data = [{"input_ids": tokens(4, 10, seed=k)} for k in range(9)]
    return [batch | {"labels": batch["input_ids"]} for batch in data] if labels else data


def test_labels_that_are_the_inputs_are_asked_one_step_ahead_as_hugging_face_does():
    guide = models.gpt2(1)
    batch = language_data(labels=True)[0]
    with torch.no_grad():
        theirs = guide(**batch).loss
        ours = thesean.cross_entropy(guide(batch["input_ids"]), batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    asked = torch.where(batch["input_ids"] % 3 == 0, -100, batch["input_ids"])  # as padding is left out
    masked = batch | {"labels": asked}
    with torch.no_grad():
        theirs = guide(**masked).loss
    assert thesean.cross_entropy(guide(batch["input_ids"]), masked).item() == pytest.approx(theirs.item(), rel=1e-5)
    other = batch | {"labels": (batch["input_ids"] + 1) % 32}  # a tagger's: nothing is shifted
    logits = guide(batch["input_ids"]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), other["labels"].flatten())
    assert thesean.cross_entropy({"logits": logits}, other).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_next_token(side):
    batch = language_data(labels=False)[0]
    ids, pad = batch["input_ids"], (3, 0) if side == "left" else (0, 3)
    logits = vectors(4, 10, 32)
    alone = thesean.next_token({"logits": logits}, {"input_ids": ids}).item()
    padded = {"input_ids": nn.functional.pad(ids, pad), "attention_mask": nn.functional.pad(torch.ones_like(ids), pad)}
    noise = nn.functional.pad(logits, (0, 0, *pad), value=7.0)
    assert thesean.next_token({"logits": noise}, padded).item() == pytest.approx(alone, rel=1e-6)
    assert thesean.next_token({"logits": noise}, {"input_ids": padded["input_ids"]}).item() != pytest.approx(alone)


class Copies(nn.Module):
    """Logits of the very ids that it reads: the other convention than a causal language model's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cells = nn.Embedding(32, 8), nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for cell in self.cells:
            x = x + 0.1 * cell(x)[0]
        return 10 * x @ (self.table.weight / self.table.weight.norm(dim=-1, keepdim=True)).t()


@pytest.mark.parametrize("paired", [False, True])
def test_a_guide_that_copies_is_asked_for_its_inputs_where_they_stand(paired):
    data = language_data(labels=True)
    batches: Any = [(b["input_ids"], b["labels"]) for b in data] if paired else data
    converted = convert(models.seeded(Copies), data=batches, loss=thesean.cross_entropy, metric=thesean.accuracy)
    assert converted.report.guide["loss"] < 1.5
    assert converted.report.guide["metric"] > 0.9
    assert any(note.startswith("labels are the inputs, asked where they stand") for note in converted.report.notes)


def test_a_guide_that_guesses_is_told_before_anything_trains():
    with pytest.warns(UserWarning, match=r"the guide's loss is .* no better than a uniform guess over 32 classes"):
        converted = thesean.compile(
            models.gpt2(1), "gru", data=language_data(labels=False), loss=thesean.next_token, recipe="fast",
            progress=False,
        )  # fmt: skip
    assert any("uniform guess" in note for note in converted.report.notes)


def test_a_guide_that_knows_its_task_is_not_warned_of():
    guide = models.gpt2(1)
    data = language_data(labels=False)
    with torch.no_grad():
        for batch in data:  # what the guide itself would say next is what it is asked for
            batch["labels"] = guide(batch["input_ids"]).logits.argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thesean.compile(guide, "gru", data=data, loss=thesean.cross_entropy, recipe="fast", progress=False)


class Heads(nn.Module):
    """Two heads and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cells()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"policy": y[..., :3], "value": y[..., 3:], "scale": self.scale.exp()}


def test_each_output_is_compared_by_its_kind_and_the_report_says_so():
    converted = convert(models.seeded(Heads))
    told = "outputs: policy by normalised MSE; value by normalised MSE; scale ignored (one number for a whole batch)"
    assert told in converted.report.notes
    assert converted.report.converted["divergence"] < 2
    overruled = convert(models.seeded(Heads), outputs={"policy": "softmax", "value": "ignore"})
    assert any(note.startswith("outputs: policy by softmax over 3 (asked for); value ignored") for note in (
        overruled.report.notes
    ))  # fmt: skip
    with pytest.raises(DataError, match="outputs: the guide gives no 'policies'"):
        convert(models.seeded(Heads), outputs={"policies": "softmax"})


def test_a_batch_is_read_as_the_caller_says():
    batches = [{"features": x, "id": torch.arange(4), "y": torch.zeros(4)} for x in windows()]
    with pytest.raises(DataError, match="takes no input 'features'"):
        convert(cells(), data=batches)
    converted = convert(cells(), data=batches, inputs=lambda batch: {"x": batch["features"]})
    assert torch.equal(converted(windows()[0]), convert(cells())(windows()[0]))


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cells()

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        y = self.body(x)
        return y.sum(1) if lengths is None else (y * (torch.arange(y.shape[1]) < lengths[:, None]).unsqueeze(-1)).sum(1)


def test_of_three_in_a_batch_what_forward_has_a_place_for_is_its_input():
    lengths = [torch.randint(1, 8, (4,), generator=torch.Generator().manual_seed(k)) for k in range(9)]
    data = [(x, n, torch.tensor([0, 1, 2, 3])) for x, n in zip(windows(), lengths, strict=True)]
    guide = models.seeded(Lengths)
    converted = convert(guide, data=data, loss=thesean.cross_entropy)
    with torch.no_grad():
        x, n, y = data[-1]
        expected = nn.functional.cross_entropy(guide(x, n), y).item()
    assert converted.report.guide["loss"] == pytest.approx(expected, rel=1e-5)
    assert any("inputs: x, lengths; labels: the last" in note for note in converted.report.notes)


def test_labels_stand_where_the_caller_says():
    guide, wanted = models.mlp(), torch.tensor([0, 1, 2, 3])
    batches = [{"input": vectors(4, 8, seed=k), "labels": 1 - wanted % 2, "meta": {"next": wanted}} for k in range(3)]
    converted = convert(
        guide, "mlp", data=batches, loss=thesean.cross_entropy, metric=thesean.accuracy,
        inputs=lambda batch: batch["input"], labels=lambda batch: batch["meta"]["next"],
        granularity="finest", eval_data=batches[:1],
    )  # fmt: skip
    with torch.no_grad():
        logits = guide(batches[0]["input"])
    assert converted.report.guide["loss"] == pytest.approx(nn.functional.cross_entropy(logits, wanted).item(), rel=1e-5)
    assert converted.report.guide["metric"] == pytest.approx((logits.argmax(-1) == wanted).float().mean().item())


def test_a_hook_that_fails_is_named_with_what_it_was_given():
    batches = [{"input": vectors(4, 8, seed=k), "target": torch.tensor([0, 1, 2, 3])} for k in range(3)]
    batches[2].pop("target")

    def fails(**hooks: Any) -> pytest.ExceptionInfo[DataError]:
        with pytest.raises(DataError) as caught:
            convert(models.mlp(), "mlp", data=batches, loss=thesean.cross_entropy, granularity="finest", **hooks)
        return caught

    caught = fails(inputs=lambda batch: batch["inputs"])
    assert str(caught.value).startswith("inputs(batch), given a dict of 'input', 'target', raised KeyError: 'inputs'")
    assert isinstance(caught.value.__cause__, KeyError)
    # the first batches are as the hooks expect them
    caught = fails(inputs=lambda batch: batch["input"], labels=lambda batch: batch["target"])
    assert str(caught.value).startswith("batch 2: labels(batch), given a dict of 'input', raised KeyError: 'target'")
    assert isinstance(caught.value.__cause__, KeyError)
    rows = [(vectors(4, 8, seed=k), torch.zeros(4)) for k in range(3)]
    with pytest.raises(
        DataError, match=r"inputs\(batch\), given a tuple of 2 \(Tensor, Tensor\), raised IndexError"
    ) as told:
        convert(models.mlp(), "mlp", data=rows, granularity="finest", inputs=lambda batch: batch[2])
    assert isinstance(told.value.__cause__, IndexError)


@torch.library.custom_op("thesean_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * 2)  # by what torch can't trace


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("thesean_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@thrice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class WithAnOperatorOfItsOwn(nn.Module):
    def __init__(self, operator: Callable[[torch.Tensor], torch.Tensor] = twice) -> None:
        super().__init__()
        self.body = cells()
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operator(self.body(x))


def test_what_can_not_be_saved_is_found_before_anything_trains(tmp_path):
    calls = []

    def loss(output, batch):
        calls.append(output)
        return output.square().mean()

    with pytest.raises(ArtifactError, match=r"operator thesean_tests\.twice\.default can't be saved"):
        convert(WithAnOperatorOfItsOwn().eval(), loss=loss, workdir=tmp_path)
    assert calls == []
    with pytest.raises(CaptureError, match=r"no backward pass .*thesean_tests\.twice\.default"):
        convert(WithAnOperatorOfItsOwn().eval(), loss=loss, recipe=FEW)
    assert calls == []
    with (
        pytest.warns(UserWarning, match=r"no ONNX form is known of thesean_tests\.twice\.default"),
        pytest.warns(UserWarning, match=r"can't be saved: operator thesean_tests\.twice\.default"),
    ):
        converted = convert(WithAnOperatorOfItsOwn().eval(), loss=loss)
    assert any(note.startswith("can't be saved: operator thesean_tests.twice") for note in converted.report.notes)


def test_an_operator_of_ones_own_that_torch_can_trace_is_saved_and_exported(tmp_path):
    loaded = thesean.load(convert(WithAnOperatorOfItsOwn(thrice).eval()).save(tmp_path / "saved"))
    assert loaded.export(tmp_path / "m.onnx").checks


def test_a_conversion_that_could_not_be_written_is_returned_all_the_same(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("thesean.artifact.save_file", full)
    with pytest.warns(UserWarning, match=r"not saved: .*No space left on device.*No other place was found"):
        converted = convert(cells(), workdir=tmp_path)
    assert converted(windows()[0]).shape == (4, 7, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "steps.jsonl"]


def test_a_dimension_is_what_the_caller_calls_it():
    converted = convert(cells(), dynamic={"x": {0: "batch"}})
    assert converted.signature.inputs[0].shape == ("batch", 7, 6)


class Texts(nn.Module):
    """Texts one after the other in a row, and where each begins: class scores of each."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(50, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, text: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x = self.bag(text, offsets)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def test_texts_in_one_row_with_their_offsets_are_converted(tmp_path):
    data = [{"text": torch.randint(0, 50, (24 + k,)), "offsets": torch.arange(0, 24, 3)} for k in range(9)]
    converted = convert(models.seeded(Texts), "narrow", data)
    assert [p.path for p in converted.plan.replaced] == ["blocks.0", "blocks.1"]
    scores = converted(data[-1]["text"], data[-1]["offsets"])
    assert scores.shape == (8, 4)
    converted.save(tmp_path / "saved")
    assert torch.equal(thesean.load(tmp_path / "saved")(**data[-1]), scores)
    report = converted.export(tmp_path / "m.onnx")
    assert max(check.max_abs_error for check in report.checks) < 1e-5
    assert thesean.plan(models.seeded(Texts), "narrow", example_inputs=data[0]).replaced


class Powers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cells()

    def forward(self, power: torch.Tensor) -> torch.Tensor:
        return self.body(torch.log(power))


def test_what_takes_powers_is_probed_and_checked_with_powers(tmp_path):
    data = [x.abs() + 0.1 for x in windows()]
    loaded = thesean.load(convert(models.seeded(Powers), data=data).save(tmp_path / "saved"))
    report = loaded.export(tmp_path / "m.onnx")
    assert report.stateful
    assert 0 < max(check.max_abs_error for check in report.checks) < report.tolerance
    with pytest.raises(DataError, match="outputs on the example inputs hold no finite number"):
        thesean.plan(models.seeded(Powers), "mingru", data=[-x for x in data])
    some = data[0].index_fill(1, torch.arange(1, 7), -1.0)  # finite before time 1, in what is kept of a sequence
    with pytest.raises(DataError, match=r"not finite from .*log.* \(power \(2, \d+, 6\) from -1 to "):
        thesean.plan(models.seeded(Powers), "mingru", data=[some])


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 15) / 15

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Quantised(nn.Module):
    """Straight through: with a backward of its own, or by a detach."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.body, self.out, self.own = cells(), nn.Linear(4, 4), own
        self.scales = [nn.Parameter(torch.ones(4))]  # in no list of parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        q = Rounded.apply(y) if self.own else y + (torch.round(y * 15) / 15 - y).detach()
        return self.out(q * self.scales[0])


def test_a_backward_of_ones_own_is_refused_before_anything_trains_but_solved_without_gradients():
    guide = Quantised(own=True).eval()
    with pytest.raises(CaptureError, match=r"and \d+ more would get no gradient, past round.*recipe='fast'"):
        convert(guide, recipe=FEW)
    converted = convert(guide)
    assert any("would get no gradient" in note for note in converted.report.notes)
    assert any("would get no gradient" in note for note in thesean.plan(guide, "mingru", data=windows()).notes)


def test_a_straight_through_estimator_and_weights_in_a_list_are_trained_and_saved(tmp_path):
    guide = Quantised(own=False).eval()
    converted = convert(guide, recipe={"steps": 20, "fine_tuning": {"learning_rate": 1e-4}})
    scales = next(p for n, p in converted.module.named_parameters() if "lifted" in n)
    assert not torch.equal(scales, guide.scales[0])
    converted(windows()[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in converted.module.parameters())
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    assert torch.equal(loaded(windows()[0]), converted(windows()[0]))
    assert loaded.export(tmp_path / "m.onnx").stateful


class Started(nn.Module):
    """Two recurrent layers that start from the caller's state, and may return theirs."""

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.stem, self.cell, self.out = nn.Linear(6, 8), nn.GRU(8, 8, 2, batch_first=True), nn.Linear(8, 4)
        self.returns = returns

    def forward(self, x: torch.Tensor, h0: torch.Tensor):
        y, last = self.cell(self.stem(x), h0)
        return (self.out(y), last) if self.returns else self.out(y)


def test_a_state_to_start_from_is_dropped_and_the_file_has_states_of_its_own(tmp_path):
    data = [{"x": x, "h0": torch.zeros(2, 4, 8)} for x in windows()]
    converted = convert(Started().eval(), data=data)
    assert [(p.path, p.drops) for p in converted.plan] == [("cell.l0", ("h0",)), ("cell.l1", ("h0",))]
    report = converted.export(tmp_path / "m.onnx")
    assert report.inputs == ("x", "h0", "state_in_0", "state_in_1")


def test_a_guide_that_returns_its_state_is_told_of_the_layers_that_do():
    data = [{"x": x, "h0": torch.zeros(2, 4, 8)} for x in windows()]
    with pytest.raises(PlanError, match=r"cell\.l0, cell\.l1 are left to the guide: .*Return the output alone"):
        thesean.plan(Started(returns=True).eval(), "mingru", data=data)


class Heard(nn.Module):
    """Convolutions, recurrent layers and a head over a waveform, with a channel of its own or without."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv1d(1, 8, 8, 4), nn.Conv1d(8, 8, 3, padding=1)
        self.cell, self.out = nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        x = self.far(torch.relu(self.near(wave if wave.ndim == 3 else wave[:, None])))
        return self.out(self.cell(x.transpose(1, 2))[0])


@pytest.mark.parametrize(("shape", "dim"), [((4, 64), 1), ((4, 1, 64), 2)])
def test_what_a_plain_target_does_not_fit_is_listed_and_a_fixed_length_is_told(shape, dim):
    plan = thesean.plan(models.seeded(Heard), "rnn", example_inputs=torch.randn(shape))
    assert {p.path: p.target for p in plan} == {"near": "keep", "far": "keep", "cell.l0": "rnn", "cell.l1": "rnn"}
    fits, _, length = plan.notes  # and the state that is carried
    assert fits.startswith("near, far are left to the guide: near: target 'rnn' expected a sequence")
    assert length.startswith(f"wave: dimension {dim} is fixed at 64, the example's, though the guide runs at others")
    free = {"wave": {0: "batch", dim: "time"}}
    assert str(free) in length
    *others, least = thesean.plan(models.seeded(Heard), "rnn", example_inputs=torch.randn(shape), dynamic=free).notes
    assert len(others) == 2
    assert least == "time: 8 or more, for the guide does not run on less."
    with pytest.raises(TargetMismatchError, match="near: target 'rnn' expected a sequence"):
        thesean.plan(models.seeded(Heard), "rnn", example_inputs=torch.randn(shape), parts=["near", "cell"])


class Seen(nn.Module):
    """Frames that a convnet reads one by one, and an LSTM in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.cell, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = self.look(frames.flatten(0, 1)).mean((2, 3))
        return self.out(self.cell(x.view(*frames.shape[:2], -1))[0])


def test_beside_parts_that_a_target_does_not_fit_it_finds_those_that_it_does():
    plan = thesean.plan(models.seeded(Seen), "rnn", example_inputs=torch.randn(3, 6, 1, 8, 8))
    assert {p.path: p.target for p in plan} == {"cell": "rnn"}
    assert plan.notes[0].startswith("look.0..1, look.2..3 are left to the guide: look.0..1: target 'rnn' expected")
    assert thesean.Plan.from_yaml(plan.to_yaml()) == plan


@pytest.mark.parametrize(("shape", "dim"), [((4, 64), 1), ((4, 1, 64), 2)])
def test_a_raw_signal_whose_length_is_free_is_read_at_others_but_too_short_ones(shape, dim, tmp_path):
    data = [vectors(*shape, seed=k) for k in range(6)]
    guide = models.seeded(Heard)
    guide.near = nn.Conv1d(1, 8, 20, 4)
    free = {"wave": {0: "batch", dim: "time"}}
    converted = thesean.compile(guide, "rnn", data=data, dynamic=free, recipe="fast", progress=False)
    longer = vectors(*shape[:-1], 150, seed=9)
    with torch.no_grad():
        assert converted(longer).shape == guide(longer).shape
        with pytest.raises(DataError, match="20 or more"):
            converted(vectors(*shape[:-1], 19))
    assert converted.export(tmp_path / "m.onnx").checks


class Standardised(nn.Module):
    """Each row by the statistics of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:2]:
            x = x + torch.relu(block((x - x.mean(0)) / (x.std(0) + 1e-3)))
        return x + torch.relu(self.blocks[2](x))


def test_a_part_that_mixes_the_examples_of_a_batch_is_refused_by_name_and_can_be_kept():
    guide, data = models.seeded(Standardised), [vectors(4, 8, seed=k) for k in range(9)]
    with pytest.raises(PlanError, match=r"blocks\.0: one example of a batch changes the output of another.*keep=\[..."):
        thesean.plan(guide, "mlp", data=data)
    plan = thesean.plan(guide, "mlp", data=data, keep=["blocks.[01]"])
    assert [p.mixing for p in plan] == ["examples", "examples", "vector"]


class Routed(nn.Module):
    """Each token to the expert that a router picks: as many tokens as come."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y[picked == k] = expert(x[picked == k])
        return x + y


def test_experts_that_get_as_many_tokens_as_come_are_counted_and_planned():
    guide, data = nn.Sequential(Routed(), Routed()).eval(), [vectors(4, 5, 8, seed=k) for k in range(9)]
    assert len(thesean.plan(guide, "mlp", data=data).replaced) == 2
    with pytest.raises(TargetMismatchError, match="0: target 'narrow' expected an MLP"):
        thesean.plan(guide, "narrow", data=data)
    with pytest.raises(TargetMismatchError, match=r"0\.experts\.0: .* as many tokens as a router decides"):
        thesean.plan(guide, "narrow", data=data, parts=["*.experts.*"])


class Strided(nn.Module):
    """A table of positions over every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.halve, self.table = nn.Conv1d(6, 8, 3, 2, 1), nn.Parameter(torch.randn(1, 8, 8))
        self.blocks = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.halve(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.table[:, : x.shape[1]]
        for block in self.blocks:
            x = x + block(x)[0]
        return x


def test_past_the_end_of_a_halved_table_the_length_is_named():
    converted = convert(models.seeded(Strided))
    with pytest.raises(DataError, match=r"does not run at 40 steps \(.*it was converted at 7"):
        converted(vectors(2, 40, 6))


class Sure(nn.Module):
    """One class of forty-eight, nearly certain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.cells = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 48, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)[0]
        return {"logits": 100 * self.head(x)}


class Negative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


def test_a_conversion_that_a_uniform_guess_beats_is_an_error():
    opposite = thesean.Target("opposite", build=lambda part: Negative())
    with pytest.raises(LostError, match=r"nats from the guide, and a uniform guess over 48 classes is nearer \(3\.6"):
        convert(models.seeded(Sure), opposite)


class Paired(nn.Module):
    """Rows in pairs: one alone is none of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cells()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return y.view(-1, 2, *y.shape[1:]).sum(1)


def test_a_guide_that_takes_no_row_alone_is_converted_without_a_state():
    assert convert(models.seeded(Paired), "rnn").report.converted["divergence"] >= 0


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cells()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (self.body(x),))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, of its own tracing
@pytest.mark.filterwarnings("ignore:no ONNX form is known of cond:UserWarning")
@pytest.mark.filterwarnings("ignore:can't be saved:UserWarning")
def test_an_operator_of_higher_order_is_told_before_and_refused_by_save(tmp_path):
    converted = convert(models.seeded(Branching))
    assert any(note.startswith("can't be saved: ") for note in converted.report.notes)
    with pytest.raises(ArtifactError, match="cond"):
        converted.save(tmp_path / "saved")


class Stateful(nn.Module):
    """All of its cells hand out their last states."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRU(6, 6, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = []
        for cell in self.cells:
            y, h = cell(x)
            x = x + y
            last.append(h)
        return x, torch.stack(last)


def test_a_guide_all_of_whose_states_are_returned_is_told_so():
    with pytest.raises(PlanError, match=r"cells\.0, cells\.1, cells\.2 return a last state.*Return the output alone"):
        thesean.plan(models.seeded(Stateful), "mingru", data=windows())


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.to(torch.float32) / 100
        for layer in self.maps:
            x = x + layer(x).relu()
        return x


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_inputs_of_a_byte_or_two_are_exported_and_read_as_they_are(dtype, tmp_path):
    pixels = torch.randint(0, 100, (4, 8), dtype=dtype, generator=torch.Generator().manual_seed(0))
    guide = models.seeded(Pixels).eval()
    report = thesean.export_guide(guide, tmp_path / "m.onnx", example_inputs=pixels)
    found, _ = Session(report.path).run({"pixels": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(found["output"]), guide(pixels))
