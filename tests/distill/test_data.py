from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests import captured
from tests.models import tokens, vectors
from thesean.distill.callbacks import length_of
from thesean.distill.data import (
    _GUESSED,
    Batches,
    Feed,
    Reading,
    by_field,
    example_inputs_of,
    example_of,
    labels_in,
    make_feed,
    named_inputs,
    synthetic,
)
from thesean.distill.losses import accuracy, next_token
from thesean.errors import DataError
from thesean.passes.capture.capture import capture

CPU = torch.device("cpu")


def fed(guide, data, eval_data=None, reading=_GUESSED, seed=0) -> Feed:
    return make_feed(guide, data, eval_data, None, seed, reading)


def batches(data, guide=None, device=CPU) -> Batches:
    return Batches(data, (guide or captured.mlp()).signature, device)


def test_batches_are_read_as_many_times_as_asked():
    data = batches([vectors(2, 8, seed=k) for k in range(3)])
    assert len(list(data)) == len(list(data)) == 3
    assert len(data.first(2)) == 2
    assert len(data.first(9)) == 3
    feed = Feed(batches=data, held_out=[], first=None, length=None)
    assert len(feed.take(2)) == len(feed.take(2)) == 2


def test_a_feed_goes_on_where_it_was_pass_after_pass():
    batches = [(k, {"x": vectors(1, 1)}) for k in range(3)]
    feed = Feed(batches=batches, held_out=[], first=None, length=None)
    assert [batch for batch, _ in itertools.islice(feed.stream, 4)] == [0, 1, 2, 0]
    assert [batch for batch, _ in itertools.islice(feed.stream, 2)] == [1, 2]
    assert [batch for batch, _ in feed.take(2)] == [0, 1]


@pytest.mark.parametrize(
    "batch",
    [
        vectors(2, 8),
        (vectors(2, 8), torch.zeros(2)),
        [vectors(2, 8), torch.zeros(2)],
        {"input": vectors(2, 8), "labels": torch.zeros(2)},
        ({"input": vectors(2, 8)}, torch.zeros(2)),
        ((vectors(2, 8),), torch.zeros(2)),
    ],
)
def test_tensors_pairs_and_dicts_hold_the_same_input(batch):
    ((whole, inputs),) = batches([batch])
    assert whole is batch
    assert list(inputs) == ["input"]
    assert torch.equal(inputs["input"], vectors(2, 8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "data is empty"),
        (torch.utils.data.TensorDataset(vectors(2, 8)), r"Give it in batches: torch\.utils\.data\.DataLoader\(data"),
        (lambda: [vectors(2, 8)], r"data is a function.*Call it first: data="),
        (iter([vectors(2, 8)]), "iterator, which can be read only once"),
        ((x for x in [vectors(2, 8)]), "iterator"),
        (vectors(2, 8), "one tensor"),
        (3, "data is a int; expected an iterable"),
    ],
)
def test_data_that_is_no_set_of_batches_is_refused(data, reason):
    with pytest.raises(DataError, match=reason):
        batches(data)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (vectors(2, 7), r"batch 1: expected input: float32\[batch, 8\], found shape \(2, 7\)"),
        (vectors(8), "batch 1: expected input"),
        (vectors(2, 8).double(), r"batch 1: input: expected torch.float32, found torch.float64\. Convert it"),
        ({"pixels": vectors(2, 8)}, "batch 1: no input 'input' in the batch, which has: pixels"),
        ((), r"batch 1: expected 1 inputs \(input\), found 0"),
        ("text", "batch 1: expected a tensor, a tuple .* found str"),
        (None, "batch 1: expected a tensor"),
        (([1.0, 2.0], 1), "batch 1: input: expected a tensor, found float"),
        (vectors(2, 8).to("meta"), "batch 1: 'input' is on meta, the guide on cpu"),
        (vectors(0, 8), r"batch 1: 'input' is empty, of shape \(0, 8\)\. Leave such batches out"),
    ],
)
def test_batches_that_do_not_fit_are_named_by_their_number(batch, reason):
    with pytest.raises(DataError, match=reason):
        list(batches([vectors(2, 8), batch]))


def test_batches_of_other_data_are_named_by_it_and_counted_from_where_it_begins():
    with pytest.raises(DataError, match=r"^eval_data, batch 4: expected input"):
        list(Batches([vectors(2, 8), vectors(2, 7)], captured.mlp().signature, CPU, name="eval_data", start=3))
    with pytest.raises(DataError, match=r"^batch 9: expected input"):  # the second of two that were held out of ten
        fed(captured.mlp(), [*(vectors(2, 8) for _ in range(15)), vectors(2, 7)][6:])


def test_a_mask_of_another_length_is_refused():
    batch = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(DataError, match=r"attention_mask.*found shape \(2, 5\) \(time=6\)"):
        list(batches([batch], captured.bert()))


def test_labels_and_what_the_guide_does_not_read_stay_out_of_its_inputs():
    batch = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long), "idx": torch.ones(2)}
    assert list(named_inputs(batch, captured.gpt2().signature)) == ["input_ids"]


def test_examples_leave_labels_out():
    x, y = vectors(2, 8), torch.zeros(2)
    assert set(example_of({"input_ids": x, "labels": y, "label": y})) == {"input_ids"}
    assert example_of((x, y)) == (x,)
    assert example_of([x, y]) == (x,)
    assert example_of(x) is x
    assert set(example_of(({"a": x, "labels": y}, y))) == {"a"}


def test_an_example_has_what_the_guide_has_a_place_for():
    x, lengths, y = vectors(2, 8), torch.ones(2), torch.zeros(2)
    assert example_of((x, lengths, y), takes=2) == (x, lengths)
    assert example_of((x, lengths, y), takes=1) == (x,)
    assert example_of((x, y), takes=2) == (x,)
    assert example_of((x, y), takes=2, needs=2) == (x, y)  # a pair that forward doesn't do without
    assert example_of((x, lengths, y), takes=3, needs=3) == (x, lengths, y)
    assert example_of((x,), takes=2, needs=2) == (x,)
    assert example_of((x,), takes=2) == (x,)
    assert example_of(((x, lengths), y), takes=2) == (x, lengths)
    assert example_of(((x, lengths), y), takes=1) == (x, lengths)


def test_labels_are_what_the_inputs_leave():
    x, lengths, y = vectors(2, 8), torch.ones(2), torch.zeros(2, dtype=torch.long)

    def same(found, *expected):
        return len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))

    assert same(labels_in((x, y)), y)
    assert same(labels_in((x, lengths, y), inputs=2), y)
    assert same(labels_in((x, lengths, y)), y, lengths)  # the likeliest first
    assert same(labels_in(((x, lengths), y), inputs=2), y)
    assert same(labels_in({"input": x, "labels": y, "label": lengths}), y, lengths)
    assert same(labels_in({"input": x, "ids": y}))
    assert same(labels_in(x))
    assert same(labels_in((x, "text")))


def test_the_callers_own_reading_of_a_batch_ends_all_guessing():
    x, y = vectors(2, 8), torch.zeros(2)
    read = Batches([(y, x)], captured.mlp().signature, CPU, Reading(inputs=lambda batch: {"input": batch[1]}))
    ((whole, inputs),) = read
    assert whole[0] is y
    assert inputs["input"] is x
    broken = Batches([(y, x)], captured.mlp().signature, CPU, Reading(inputs=lambda batch: {"pixels": batch[1]}))
    with pytest.raises(DataError, match="batch 0: no input 'input' in the batch, which has: pixels"):
        list(broken)


def test_labels_that_the_caller_tells_come_beside_the_batch_as_it_was():
    x, answers = vectors(2, 8), torch.tensor([1, 2])
    batch = {"input": x, "meta": {"answers": answers}, "labels": torch.tensor([0, 0])}
    ((told, inputs),) = Batches([batch], captured.mlp().signature, CPU, Reading(labels=lambda b: b["meta"]["answers"]))
    assert told[0] is batch
    assert inputs["input"] is x
    assert labels_in(told)[0] is answers
    logits = torch.eye(5)[answers] * 9
    assert accuracy(logits, told) == 1.0
    assert accuracy(logits, batch) == 0.0


def test_next_token_reads_ids_beside_labels():
    ids_BT, logits_BTV = torch.randint(0, 7, (2, 5)), vectors(2, 5, 7)
    batch = {"input_ids": ids_BT}
    torch.testing.assert_close(next_token(logits_BTV, (batch, ids_BT)), next_token(logits_BTV, batch))


@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_without_gradients_is_looked_at_in_pieces_and_is_the_same(masked, monkeypatch):
    monkeypatch.setattr("thesean.distill.losses._PIECE", 3 * 7)
    batch = {"input_ids": torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))}
    if masked:
        batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    logits_BTV = vectors(2, 5, 7)
    whole = next_token(logits_BTV, batch)
    with torch.no_grad():
        torch.testing.assert_close(next_token(logits_BTV, batch), whole)


def test_synthetic_inputs_fit_the_guide_and_follow_the_seed():
    signature = captured.gpt2().signature
    first, again, other = (synthetic(signature, {"batch": 2, "time": 5}, CPU, 3, seed) for seed in (0, 0, 1))
    assert len(first) == 3
    for a, b, c in zip(first, again, other, strict=True):
        assert signature.check(a) == {"batch": 2, "time": 5}
        assert int(a["input_ids"].max()) < 32
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert not torch.equal(a["input_ids"], c["input_ids"])


class Placed(torch.nn.Module):
    """ids_BT -> x_BTD, with a table of so many places."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(8, 4), torch.nn.Embedding(count, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


def test_without_data_inputs_of_the_examples_sizes_are_made_up_and_it_is_said():
    guide = captured.gpt2()
    feed = make_feed(guide, None, None, dict(guide.example), seed=0)
    sizes = guide.signature.check(guide.example)
    shapes = ", ".join(f"{name} {size}" for name, size in sizes.items())
    (told,) = feed.warnings
    assert told.startswith(f"no data given: parts are aligned on synthetic inputs ({shapes}).")
    assert feed.notes == feed.warnings  # and nothing of inputs and labels, or of what was held out
    (_, inputs), *_ = feed.take(1)
    assert guide.signature.check(inputs) == sizes
    assert feed.length == sizes["time"]
    assert (len(list(feed.batches)), len(feed.held_out)) == (14, 2)


def test_what_was_taken_for_what_is_told():
    x, y = vectors(2, 8), torch.tensor([0, 1])
    read = "inputs: input; labels: {}. inputs= and labels= say otherwise"
    for batch, told in (
        (x, []),
        ((x,), []),
        ((x, y), [read.format("the last")]),
        ((x, y, y), [read.format("the last that fits, of 3")]),
        ({"input": x}, [read.format("none")]),
        ({"input": x, "label": y}, [read.format("label")]),
        ({"input": x, "labels": y, "idx": y, 3: y}, [read.format("labels"), "of each batch no input: idx, 3"]),
    ):
        assert list(fed(captured.mlp(), [batch], [batch]).notes) == told
    own = Reading(inputs=lambda batch: {"input": batch[1]}, labels=lambda batch: batch[0])
    feed = fed(captured.mlp(), [(y, x)], [(y, x)], own)
    assert not feed.notes
    assert feed.example_labels[0] is y


def test_held_out_are_the_callers_own_batches_or_some_of_the_data():
    data, own = [vectors(2, 8, seed=k) for k in range(8)], [vectors(2, 8, seed=9)]
    for feed, trained, held in (
        (fed(captured.mlp(), data), data[:7], data[7:]),
        (fed(captured.mlp(), data, own), data, own),
    ):
        assert [batch for batch, _ in feed.batches] == trained or all(
            map(torch.equal, [b for b, _ in feed.batches], trained)
        )
        assert all(map(torch.equal, [batch for batch, _ in feed.held_out], held))
        assert torch.equal(feed.first, data[0])
    few = fed(captured.mlp(), data[:3])
    assert [len(list(few.batches)), len(few.held_out)] == [3, 3]  # too few to part with one
    assert "measured on training batches" in few.notes[0]


def test_evaluation_data_without_a_length_is_read_as_far_as_fits(monkeypatch):
    class Unsized:
        def __iter__(self):
            return iter([vectors(2, 8)] * 3)

    monkeypatch.setattr("thesean.distill.data._MOST_HELD", 3)
    feed = fed(captured.mlp(), [vectors(2, 8)], Unsized())
    assert (len(feed.held_out), feed.warnings) == (3, ())
    monkeypatch.setattr("thesean.distill.data._MOST_HELD", 2)
    feed = fed(captured.mlp(), [vectors(2, 8)], Unsized())
    assert len(feed.held_out) == 2
    assert feed.warnings == ("eval_data has no len() and did not end: measured on its first 2 batches",)
    monkeypatch.setattr("thesean.distill.data._MOST_HELD", 1024)
    monkeypatch.setattr("thesean.distill.data._MOST_HELD_BYTES", 2 * 8 * 4)
    assert len(fed(captured.mlp(), [vectors(2, 8)], Unsized()).held_out) == 2


class Streaming(IterableDataset[torch.Tensor]):
    """Rows without an end; a loader of it has a len(), which raises."""

    def __iter__(self):
        return itertools.repeat(torch.ones(8))


class Declining(Streaming):
    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize("rows", [Streaming(), Declining()], ids=["no len", "a len that is not implemented"])
def test_a_loader_that_only_streams_tells_no_length(monkeypatch, rows):
    monkeypatch.setattr("thesean.distill.data._MOST_HELD", 2)
    loader: Any = DataLoader(rows, batch_size=2)
    assert length_of(loader) is None
    assert length_of(DataLoader([torch.ones(8)] * 6, batch_size=2)) == 3  # type: ignore[arg-type]
    feed = fed(captured.mlp(), [vectors(2, 8)], loader)
    assert feed.warnings == ("eval_data has no len() and did not end: measured on its first 2 batches",)
    trained = fed(captured.mlp(), loader)
    assert "held out" in trained.notes[0]


def test_a_guide_is_traced_with_what_is_given_else_with_data_else_with_its_own_inputs():
    x, y = vectors(2, 3), torch.tensor([0, 1])
    model = nn.Linear(3, 2)
    assert example_inputs_of(model, [(x, y)], {"x": y}) == {"x": y}
    assert example_inputs_of(model, [(x, y)], None) == (x,)
    assert example_inputs_of(model, [(x, y)], None, inputs=lambda batch: batch[1]) is y
    assert example_inputs_of(model, None, None) is None
    model.dummy_inputs = {"x": x}  # type: ignore[assignment]
    assert example_inputs_of(model, None, None) == {"x": x}


@pytest.mark.parametrize("names", [("start_positions", "end_positions"), ("labels", "next_sentence_label")])
def test_what_transformers_calls_a_label_is_no_input(names):
    y = torch.tensor([0, 1])
    model = nn.Linear(3, 2)
    model.forward = lambda x, **labels: x  # type: ignore[method-assign]
    batch = {"x": vectors(2, 3), **dict.fromkeys(names, y)}
    assert example_inputs_of(model, [batch], None).keys() == {"x"}
    assert len(labels_in(batch)) == 2


def test_of_a_batch_for_training_it_is_told_how_its_decoders_inputs_are_made():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes))
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[3, 4, -100]])}
    with pytest.raises(DataError, match="takes decoder_input_ids, which it makes of labels where it trains") as told:
        example_inputs_of(model, [batch], None)
    inputs = eval(str(told.value).partition("inputs=")[2], {"model": model})  # as a user would copy it
    found = inputs(batch)
    assert found.keys() == {"input_ids", "decoder_input_ids"}
    assert found["decoder_input_ids"].tolist() == [[0, 3, 4]]
    assert example_inputs_of(model, [{**batch, **found}], None).keys() == found.keys()
    classes = {**batch, "labels": torch.tensor([1])}  # of whole sequences: nothing to decode
    assert example_inputs_of(model, [classes], None).keys() == {"input_ids"}


def test_of_a_batchs_columns_those_are_read_that_forward_has_a_place_for():
    def forward_of(function) -> nn.Module:
        model = nn.Linear(3, 2)
        model.forward = function  # type: ignore[method-assign]
        return model

    x, y = vectors(2, 3), torch.tensor([0, 1])
    optional = forward_of(lambda x, mask=None: x)
    assert example_inputs_of(optional, [{"x": x, "mask": y, "idx": y}], None) == {"x": x, "mask": y}
    assert example_inputs_of(optional, [{"x": x, "mask": None, "idx": y}], None) == {"x": x}
    anything = forward_of(lambda x, **others: x)
    assert example_inputs_of(anything, [{"x": x, "idx": y}], None) == {"x": x, "idx": y}
    assert example_inputs_of(optional, [(x, y, y)], None) == (x, y)  # as many as it takes
    assert example_inputs_of(forward_of(lambda x, *, mask=None: x), [(x, y, y)], None) == (x,)


def test_synthetic_inputs_are_as_long_as_the_guide_can_read():
    guide = capture(Placed(20), tokens(2, 5) % 8)
    feed = make_feed(guide, None, None, None, seed=0)
    assert {tuple(batch["ids"].shape) for _, batch in feed.take(3)} == {(8, 16)}


class Fields(NamedTuple):
    label: torch.Tensor
    x: torch.Tensor


@dataclass
class Recorded:
    x: torch.Tensor
    labels: torch.Tensor


def test_fields_are_read_by_their_names():
    x, y = vectors(2, 3), torch.tensor([0, 1])
    for batch in (Fields(y, x), Recorded(x, y)):
        assert by_field(batch, ["x"])["x"] is x
        assert labels_in(batch)[0] is y
    assert by_field(Fields(y, x), ["z"]) == Fields(y, x)  # by place, then
    model = nn.Linear(3, 2)
    model.forward = lambda x: x  # type: ignore[assignment, method-assign]
    assert example_inputs_of(model, [Fields(y, x)], None) == {"x": x}
    assert example_inputs_of(model, [{"x": x, "target": y, "id": 3}], None) == {"x": x}
    assert list(example_inputs_of(model, [{"wrong": x}], None)) == ["wrong"]


def test_labels_may_stand_in_a_tuple_of_their_own():
    x, y, z = vectors(2, 3), torch.tensor([0, 1]), vectors(2)
    assert [v.dtype for v in labels_in(((x, x), (y, z)), 2)] == [torch.int64, torch.float32]


def test_a_second_pass_that_raises_is_told_as_the_datas():
    class ReadOnce:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield torch.ones(2, 3) if self.passes == 1 else torch.load("/no/disk")

    with pytest.raises(DataError, match=r"^data, batch 0: .*/no/disk"):
        example_inputs_of(nn.Linear(3, 2), ReadOnce(), None)
