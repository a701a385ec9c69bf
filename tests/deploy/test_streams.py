"""Streams of tokens that come and go in one batch: each writes what it would write alone.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests import captured, models
from tests.causal_guides import family
from tests.exported import gpt2_gru, gpt2_guide, hybrid
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.deploy.streams import Streams, _Batch
from thesean.errors import DataError, NumericalError, StateError, UnknownNameError

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [9, 3], [2]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Session:
    """A cell's state, an attention's keys and values, a count of steps, and an input that is a mask."""
    guide = family("gpt2", masked=True)
    module = hybrid(guide, {"*.0": "gru", "*.1": "keep"})
    return Session(export(module, guide.signature, tmp_path_factory.mktemp("streams") / "m.onnx").path)


def watched(streams: Streams) -> list[tuple[list[int], np.ndarray]]:
    """(tokens, logits) of each row of each run that is to come."""
    runs: list[tuple[list[int], np.ndarray]] = []
    original: Callable[..., Any] = streams._read

    def read(chunk_BT, state, encoded):
        logits_BV, after = original(chunk_BT, state, encoded)
        runs.extend((ids.tolist(), logits_V) for ids, logits_V in zip(chunk_BT, logits_BV, strict=True))
        return logits_BV, after

    streams._read = read  # type: ignore[method-assign]
    return runs


def whole_logits(session: Session, ids: list[int]) -> np.ndarray:
    """After the last token of a sequence, read alone and at once."""
    inputs = {name: np.array([ids]) if name == "input_ids" else np.ones((1, len(ids))) for name in session.inputs}
    return session.run(inputs)[0]["logits"][0, -1]


def check_coming_and_going(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join at any time, with prompts of any length, and leave; the logits of each are those of it alone."""
    streams = session.streams()
    logits: dict[int, list[np.ndarray]] = {}
    made: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    original = _Batch.choose

    def choose(batch: _Batch, logits_BV: np.ndarray) -> list[int]:
        for name, logits_V in zip(batch.streams, logits_BV, strict=True):
            logits[name].append(logits_V.copy())
        return original(batch, logits_BV)

    monkeypatch.setattr(_Batch, "choose", choose)

    def join(prompt: list[int]) -> None:
        name = streams.join(prompt)
        prompts[name], made[name], logits[name] = prompt, [], []

    def step() -> None:
        for name, token in streams.step().items():
            made[name].append(token)

    join(PROMPTS[0])
    join(PROMPTS[1])
    for _ in range(3):
        step()
    join(PROMPTS[2])
    step()
    streams.leave(0)  # the longest past
    step()
    join(PROMPTS[3])
    join(PROMPTS[4])
    step()
    streams.leave(1)
    streams.leave(4)
    join(PROMPTS[0])
    for _ in range(2):
        step()
    assert {name: len(tokens) for name, tokens in made.items()} == {0: 4, 1: 6, 2: 5, 3: 3, 4: 1, 5: 2}
    assert {name: len(each) for name, each in logits.items()} == {name: len(tokens) for name, tokens in made.items()}
    for name, prompt in prompts.items():
        for k, found_V in enumerate(logits[name]):
            np.testing.assert_allclose(found_V, whole_logits(session, [*prompt, *made[name][:k]]), rtol=1e-5, atol=1e-5)
    assert sorted(streams) == [2, 3, 5]
    assert len(streams) == 3


def test_rows_that_join_and_leave_change_nothing_for_the_others(mixed, monkeypatch):
    assert mixed.has_rows
    check_coming_and_going(mixed, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mistral", "gpt_neo", "bloom", "llama", "opt"])
def test_so_it_is_with_windows_biases_rotations_and_masks(tmp_path, name, monkeypatch):
    guide = family(name, masked=name == "opt")
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    check_coming_and_going(Session(report.path), monkeypatch)


def test_so_it_is_with_a_file_of_recurrent_parts_and_one_without_a_state(monkeypatch):
    assert gpt2_gru().session.has_rows
    check_coming_and_going(gpt2_gru().session, monkeypatch)
    assert not gpt2_guide().session.is_stateful
    check_coming_and_going(gpt2_guide().session, monkeypatch)


def test_all_rows_take_one_run_a_step_and_what_prompts_share_in_length_is_read_at_once(mixed):
    streams = mixed.streams()
    runs = watched(streams)
    for prompt in ([1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]):
        streams.join(prompt)
    streams.step()
    assert [ids for ids, _ in runs] == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11]]
    assert len(streams._batches) == 1
    runs.clear()
    streams.step()
    assert [len(ids) for ids, _ in runs] == [1, 1, 1]


def test_steps_that_nobody_remembers_any_more_are_dropped(mixed):
    streams = mixed.streams()
    long, short = streams.join(list(range(1, 21))), streams.join([1, 2])
    streams.step()
    past = [name for name in mixed.states if name in mixed._table.past]
    assert past
    assert {streams._batches[0].state[name].shape[mixed._table.past[name][0]] for name in past} == {20}
    streams.leave(long)
    streams.step()
    assert {streams._batches[0].state[name].shape[mixed._table.past[name][0]] for name in past} == {3}
    assert list(streams) == [short]


def test_a_stream_goes_on_from_a_state_that_was_kept(mixed, tmp_path):
    streams = mixed.streams()
    first, other = streams.join(PROMPTS[0]), streams.join(PROMPTS[2])
    made = [streams.step() for _ in range(4)]
    mixed.save_state(tmp_path / "first.state", streams.state(first))
    expected = [streams.step()[first] for _ in range(5)]
    again = mixed.streams()
    again.join(PROMPTS[1])
    again.step()
    name = again.join([made[-1][first]], state=mixed.load_state(tmp_path / "first.state"))
    assert [again.step()[name] for _ in range(5)] == expected
    assert other in streams
    assert {n: len(v) for n, v in again.state(name).items()} == dict.fromkeys(mixed.states, 1)


def test_a_stream_that_waits_has_the_state_it_came_with(mixed):
    streams = mixed.streams()
    stream = streams.join([1])
    assert not any(value.any() for value in streams.state(stream).values())
    kept = mixed.run({"input_ids": np.array([[5, 6]]), "attention_mask": np.ones((1, 2))})[1]
    assert streams.state(streams.join([1], state=kept)) is kept


def test_streams_that_fail_are_as_they_were_before(mixed, monkeypatch):
    streams = mixed.streams()
    good = streams.join(PROMPTS[0])
    made = [streams.step()[good] for _ in range(2)]
    with pytest.raises(DataError, match="input_ids holds 32; expected ids from 0 to 31"):
        streams.join([models.VOCABULARY])  # and not when all are stepped
    bad = streams.join([1, 2])
    with monkeypatch.context() as broken:
        broken.setattr(streams, "_read_together", lambda group: mixed.run({}))
        with pytest.raises(DataError, match="missing input 'input_ids'"):
            streams.step()
    streams.leave(bad)
    made += [streams.step()[good] for _ in range(3)]
    assert made == mixed.generate(PROMPTS[0], 5)


def test_a_stream_that_is_not_there_is_told(mixed):
    streams = mixed.streams()
    assert streams.step() == {}
    streams.join([1])
    for call in (streams.leave, streams.state):
        with pytest.raises(DataError, match="there is no stream 7; those that are there: 0"):
            call(7)


def test_what_no_stream_can_begin_with_is_refused(mixed):
    streams = mixed.streams()
    for prompt, message in (([], "empty"), ([-1], "none below 0"), ([1.5], "whole numbers"), ([[1]], "a sequence")):
        with pytest.raises(DataError, match=message):
            streams.join(prompt)
    with pytest.raises(DataError, match="seed: expected"):
        streams.join([1], seed=-1)
    with pytest.raises(StateError, match=r"the state is of 2 rows, expected 1"):
        streams.join([1], state=mixed.zero_state(2))
    with pytest.raises(DataError, match="carries no state"):
        gpt2_guide().session.streams().join([1], state={})
    assert len(streams) == 0


def test_rows_that_count_their_steps_together_are_read_one_by_one(tmp_path):
    """As files were written before rows had counts of their own."""
    import onnx

    text: Any = """
        <ir_version: 10, opset_import: ["" : 20]>
        old (int64[batch, time] ids, int64[1] state_in_0) => (float[batch, time, V] y, int64[1] state_out_0) {
            steps = Shape <start = 1, end = 2> (ids)
            state_out_0 = Add (state_in_0, steps)
            depth = Constant <value = int64 {20}> ()
            values = Constant <value = float[2] {0.0, 1.0}> ()
            after = Add (ids, state_out_0)
            y = OneHot (after, depth, values)
        }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "old.onnx")
    session = Session(tmp_path / "old.onnx")
    assert not session.has_rows
    # the last token and as many steps as were read
    assert session.generate([[1, 2], [3]], 3) == [[4, 7, 11], [4, 6, 9]]
    streams = session.streams()
    names = [streams.join([1, 2]), streams.join([3])]
    streams.step()
    assert [int(streams.state(name)["state_in_0"][0]) for name in names] == [2, 1]
    with pytest.raises(StateError, match="count their steps together in this file"):
        session.take_rows(session.zero_state(2), [0])


def test_files_that_write_no_text_are_refused(tmp_path):
    encoder = captured.encoder()
    session = Session(export(encoder.graph_module, encoder.signature, tmp_path / "e.onnx").path)
    with pytest.raises(DataError, match="the file takes no tokens"):
        session.streams()
    import onnx

    text: Any = """
        <ir_version: 10, opset_import: ["" : 20]>
        pooled (int64[batch, time] ids) => (int64[batch, 1] y) { y = ReduceSum <keepdims = 1> (ids, axis) }
    """
    model = onnx.parser.parse_model(text.replace("{ y", "{ axis = Constant <value = int64[1] {1}> () y"))
    onnx.save(model, tmp_path / "pooled.onnx")
    with pytest.raises(DataError, match=r"output 'y': expected logits \(batch, time, vocabulary\), found the shape"):
        Session(tmp_path / "pooled.onnx").generate([1, 2], 1)


@torch.no_grad()
def greedy(module: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        inputs = (torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
        ids.append(int(module(*inputs)["logits"][0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_of_prompts_of_any_lengths_is_continued_as_torch_continues_each(mixed):
    module = hybrid(family("gpt2", masked=True), {"*.0": "gru", "*.1": "keep"})
    expected = [greedy(module, prompt, 12) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    assert mixed.generate(PROMPTS, 12) == expected
    assert mixed.generate(PROMPTS[0], 12) == expected[0]


def test_a_row_ends_with_its_own_stop_id(mixed):
    everything = mixed.generate(PROMPTS, 12)
    stops = [everything[0][3], everything[2][0]]
    found = mixed.generate(PROMPTS, 12, stop_ids=stops)
    for row, whole in zip(found, everything, strict=True):
        end = next((k for k, token in enumerate(whole) if token in stops), len(whole) - 1)
        assert row == whole[: end + 1]
    assert len(found[2]) == 1


def test_a_seed_gives_the_same_text_and_each_row_draws_for_itself(mixed):
    settings = {"temperature": 1.5, "top_k": 20}
    first = mixed.generate(PROMPTS, 10, seed=3, **settings)
    assert mixed.generate(PROMPTS, 10, seed=3, **settings) == first
    assert mixed.generate(PROMPTS[0], 10, seed=3, **settings) == first[0]
    assert mixed.generate([PROMPTS[0]] * 2, 10, seed=3, **settings)[1] != first[0]
    assert mixed.generate(PROMPTS, 10, seed=4, **settings) != first
    assert mixed.generate(PROMPTS, 10, **settings) != mixed.generate(PROMPTS, 10, **settings)


def test_streams_that_draw_and_one_that_does_not_are_stepped_together(mixed):
    drawing: Any = dict(temperature=3.0, seed=3)
    wanted = [mixed.generate(PROMPTS[0], 8), mixed.generate(PROMPTS[1], 8, **drawing)]
    streams = mixed.streams()
    names = [streams.join(PROMPTS[0]), streams.join(PROMPTS[1], **drawing)]
    made = [streams.step() for _ in range(8)]
    assert [[step[name] for step in made] for name in names] == wanted
    assert wanted[1] != mixed.generate(PROMPTS[1], 8)


def test_the_penalty_knows_the_prompt_and_what_was_written(mixed):
    prompt, penalty = [7, 8, 9], 1.4
    ids = list(prompt)
    for _ in range(12):
        logits_V = whole_logits(mixed, ids)
        for token in set(ids):
            logits_V[token] = logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
        ids.append(int(logits_V.argmax()))
    assert mixed.generate(prompt, 12, repetition_penalty=penalty) == ids[3:]
    assert mixed.generate(prompt, 12) != ids[3:]


def test_logits_that_are_no_numbers_are_an_error(mixed, monkeypatch):
    run = mixed.run

    def spoiled(inputs, state=None):
        outputs, after = run(inputs, state)
        outputs["logits"][-1, -1, 3] = np.nan
        return outputs, after

    monkeypatch.setattr(mixed, "run", spoiled)
    with pytest.raises(NumericalError, match="logits are NaN"):
        mixed.generate(PROMPTS, 3)


def test_nothing_comes_of_nothing(mixed):
    assert mixed.generate([[1], [2]], 0) == [[], []]
    with pytest.raises(DataError, match="max_new_tokens: expected a whole number of at least 0, found -1"):
        mixed.generate([1], -1)
    with pytest.raises(DataError, match="the prompt is empty"):
        mixed.generate([[1], []], 3)
    with pytest.raises(DataError, match="the prompt is empty"):
        mixed.generate([], 3)
    with pytest.raises(DataError, match="the prompt: expected a sequence of whole numbers"):
        mixed.generate([3, [1]], 3)
    for prompts in (None, 5, "words", {"input_ids": [1]}, iter([1])):
        with pytest.raises(DataError, match="prompts: expected a list of token ids, or a list of such lists, found a"):
            mixed.generate(prompts, 3)


def test_words_of_another_library_and_stops_that_never_come_are_refused(mixed):
    for stops in (0, None, "0", [1.5], [[1]]):
        with pytest.raises(DataError, match="stop_ids: expected a list of token ids, found"):
            mixed.generate([1], 3, stop_ids=stops)
    with pytest.raises(UnknownNameError, match="unknown setting 'temprature'; did you mean 'temperature'"):
        mixed.generate([1], 3, temprature=1.0)
    with pytest.raises(UnknownNameError, match=r"unknown setting 'do_sample'\. known: min_p, repetition_penalty"):
        mixed.streams().join([1], do_sample=True)
    with pytest.raises(DataError, match="seed: expected a whole number of at least 0, found 'a'"):
        mixed.generate([1], 3, seed="a")
    for kind in (np.array, torch.tensor):  # whose numbers are no keys of a set of Python's
        last = mixed.generate([1], 3)[-1]
        assert mixed.generate(kind([1]), np.int64(9), stop_ids=kind([last]))[-1] == last
