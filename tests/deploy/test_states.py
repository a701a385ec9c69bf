"""States: which fit, kept on the disk, and a batch of sequences in chunks.

B batch, T time
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests import captured, models
from tests.causal_guides import family
from tests.exported import gpt2_gru, gpt2_guide, hybrid
from thesean import Target
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.errors import DataError, ExportError, StateError, WriteError

AHEAD = 2


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Session:
    """Two attentions with their keys and values."""
    guide = family("gpt2")
    return Session(export(guide.graph_module, guide.signature, tmp_path_factory.mktemp("states") / "m.onnx").path)


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> tuple[torch.nn.Module, Session]:
    """Outputs come so many steps late."""
    guide = captured.bert()
    module = hybrid(guide, Target("rnn", lookahead=AHEAD // 2))
    session = Session(export(module, guide.signature, tmp_path_factory.mktemp("late") / "m.onnx").path)
    assert session.delay == AHEAD
    return module, session


def ids(batch: int, length: int) -> dict[str, np.ndarray]:
    return {"input_ids": models.tokens(batch, length).numpy()}


def test_a_stream_keeps_the_state_between_chunks(kept):
    whole = kept.run(ids(3, 12))[0]["logits"]
    stream = kept.stream()
    chunks = np.split(ids(3, 12)["input_ids"], [1, 2, 9], 1)
    parts = [stream({"input_ids": chunk})["logits"] for chunk in chunks]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert stream.end() == {}
    np.testing.assert_array_equal(stream(ids(3, 12))["logits"], whole)  # anew


def test_a_stream_goes_on_from_a_state(kept):
    whole = kept.run(ids(2, 9))[0]["logits"]
    _, state = kept.run(ids(2, 9) | {"input_ids": ids(2, 9)["input_ids"][:, :4]})
    stream = kept.stream(state)
    found = stream({"input_ids": ids(2, 9)["input_ids"][:, 4:]})["logits"]
    np.testing.assert_allclose(found, whole[:, 4:], rtol=1e-5, atol=1e-5)


def test_a_chunk_that_is_refused_leaves_the_stream_where_it_was(kept):
    stream = kept.stream()
    stream(ids(2, 4))
    before = stream.state
    with pytest.raises(StateError, match="the state is of 2 rows, expected 3"):
        stream(ids(3, 1))
    assert stream.state is before


@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 5), (9,)], ids=str)
@torch.no_grad()
def test_outputs_that_come_late_are_in_their_place_all_in_a_row(late, sizes):
    module, session = late
    given = {"input_ids": models.tokens(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    whole = module(**given)["last_hidden_state"].numpy()
    stream = session.stream()
    pieces = list(zip(*(value.split(sizes, 1) for value in given.values()), strict=True))
    for _ in range(2):  # and anew
        parts = [stream({n: v.numpy() for n, v in zip(given, piece, strict=True)}) for piece in pieces]
        found = np.concatenate([part["last_hidden_state"] for part in (*parts, stream.end())], 1)
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_no_next_token_is_told_from_outputs_that_come_late(late):
    with pytest.raises(DataError, match=f"the file's outputs come {AHEAD} steps late"):
        late[1].generate([1, 2], 3)


def test_a_chunk_without_a_step_or_a_row_is_refused(kept):
    for shape in ((2, 0), (0, 3)):
        with pytest.raises(DataError, match=r"input_ids: expected at least one row and one step, found the shape"):
            kept.run({"input_ids": np.zeros(shape, np.int64)})


def test_inputs_that_are_no_arrays_are_refused(kept):
    for value in ([[1, 2], [3]], [["word"]]):
        with pytest.raises(DataError, match="input_ids: expected an array of numbers"):
            kept.run({"input_ids": value})


def test_what_is_no_state_and_rows_that_there_are_not_are_refused(kept, tmp_path):
    for nothing in ([1, 2], "state", 5):
        for call in (lambda s: kept.run(ids(1, 1), s), lambda s: kept.save_state(tmp_path / "s", s), kept.check_state):
            with pytest.raises(StateError, match="expected a state, arrays by name as `run` gives them, found a"):
                call(nothing)
    for rows in ([2], [-1], 1, "a", [True, False]):
        with pytest.raises(StateError, match="rows: expected whole numbers from 0 to 1, found"):
            kept.take_rows(kept.zero_state(2), rows)
    with pytest.raises(StateError, match="expected the states of one row or more to join, found none"):
        kept.join_rows([])
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_batch_or_shape_or_dtype_is_refused(kept):
    state = kept.run(ids(2, 4))[1]
    with pytest.raises(StateError, match=r"state_in_\d: the state is of 2 rows, expected 3"):
        kept.run(ids(3, 1), state)
    with pytest.raises(StateError, match="the state is of 2 rows, expected 1"):
        kept.run(ids(1, 1), state)  # which would be repeated without a word
    for name, broken, message in (
        ("state_in_1", state["state_in_1"][..., 1:], r"expected \(2, 2, past, 8\), found \(2, 2, 4, 7\)"),
        ("state_in_1", state["state_in_1"][:, :, 1:], "of another file or batch"),
        ("state_in_1", state["state_in_1"][0], "of another file or batch"),
        ("state_in_1", state["state_in_1"][0, 0], "of another file or batch"),
        ("state_in_1", state["state_in_1"].astype(np.float64), "expected an array of float32, found float64"),
        ("state_in_0", state["state_in_0"].tolist(), "expected an array of bool, found list"),
    ):
        with pytest.raises(StateError, match=f"{name}: .*{message}"):
            kept.run(ids(2, 1), {**state, name: broken})


def test_a_state_of_another_file_is_refused_though_it_has_the_same_shapes(kept, tmp_path):
    with pytest.raises(StateError, match=r"the state is of another file: expected state_in_0, .*, found state_in_0"):
        kept.run(ids(1, 1), dict(gpt2_gru().session.zero_state(1)))
    with pytest.raises(StateError, match=r"the state is of another file: .* found none"):
        kept.run(ids(1, 1), {})
    guide = family("gpt2")
    report = export(guide.graph_module, guide.signature, tmp_path / "other.onnx", about={"of": "another"})
    other = Session(report.path)
    state = kept.run(ids(1, 3))[1]
    with pytest.raises(StateError, match=r"the state is of another file, .*m\.onnx; this one is .*other\.onnx"):
        other.run(ids(1, 1), state)
    other.run(ids(1, 1), dict(state))  # which tells of no file
    with pytest.raises(StateError, match="of another file"):
        other.save_state(tmp_path / "s", state)
    assert not (tmp_path / "s").exists()
    kept.save_state(tmp_path / "s", state)
    with pytest.raises(StateError, match="is a state of another file than"):
        other.load_state(tmp_path / "s")


def test_a_state_is_kept_and_goes_on_in_another_process_session(kept, tmp_path):
    state = kept.run(ids(2, 5))[1]
    path = kept.save_state(tmp_path / "new" / "talk.safetensors", state)
    again = Session(kept._table.file.path)
    loaded = again.load_state(path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name], value)
    np.testing.assert_array_equal(again.run(ids(2, 1), loaded)[0]["logits"], kept.run(ids(2, 1), state)[0]["logits"])
    again.run(ids(2, 1), state)  # of the same file, in memory too


def test_what_is_no_saved_state_is_refused(kept, tmp_path):
    path = tmp_path / "s"
    with pytest.raises(StateError, match=r"can't read .*: No such file"):
        kept.load_state(path)
    path.write_bytes(b"no state")
    with pytest.raises(StateError, match="is no saved state"):
        kept.load_state(path)
    state = kept.run(ids(2, 5))[1]
    save_file(state, path)
    with pytest.raises(StateError, match="doesn't tell of which file"):
        kept.load_state(path)
    kept.save_state(path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StateError, match="is no saved state"):
        kept.load_state(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StateError, match="was changed since it was saved"):
        kept.load_state(path)
    save_file(state, path, {"thesean.file_sha256": hash_of(kept)})  # as earlier versions wrote it
    assert kept.load_state(path).keys() == state.keys()
    nothing = kept.zero_state(1)
    assert kept.load_state(kept.save_state(path, nothing)).keys() == nothing.keys()
    save_file({n: v for n, v in state.items() if n != "state_in_2"}, path, {"thesean.file_sha256": hash_of(kept)})
    with pytest.raises(StateError, match="the state is of another file"):
        kept.load_state(path)


def hash_of(session: Session) -> str:
    return session._table.file.hash


def test_a_state_that_can_not_be_written_leaves_what_was_there(kept, tmp_path):
    state = kept.run(ids(2, 5))[1]
    kept.save_state(tmp_path / "s", state)
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(StateError):
        kept.save_state(tmp_path / "s", {**state, "state_in_0": state["state_in_0"].astype(np.int8)})
    assert (tmp_path / "s").read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="it is a folder"):
        kept.save_state(tmp_path / "folder", state)
    with pytest.raises(WriteError, match="can't write"):
        kept.save_state(3, state)
    assert load_file(tmp_path / "s").keys() == state.keys()


def test_a_file_that_was_replaced_can_not_say_what_its_states_are_of(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(gpt2_gru().path.read_bytes())
    session = Session(path)
    state = session.run(ids(1, 3))[1]
    path.write_bytes(gpt2_guide().path.read_bytes())
    with pytest.raises(StateError, match=r"m\.onnx was replaced or removed since it was loaded"):
        session.save_state(tmp_path / "s", state)
    path.unlink()
    with pytest.raises(StateError, match="was replaced or removed"):
        session.save_state(tmp_path / "s", state)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_taken_and_joined_wherever_each_is(kept):
    one, three = kept.run(ids(1, 2))[1], kept.run(ids(3, 6))[1]
    joined = kept.join_rows([three, one])
    assert {n: len(v) for n, v in joined.items()} == dict.fromkeys(kept.states, 4)
    kept.check_state(joined, 4)
    for rows, state in (([0, 1, 2], three), ([3], one)):
        back = kept.take_rows(joined, rows)
        assert all(np.array_equal(back[name], state[name]) for name in kept.states)
    mirrored = kept.take_rows(three, [2, 0])
    np.testing.assert_array_equal(mirrored["state_in_1"], three["state_in_1"][[2, 0]])


@pytest.fixture
def beside(tmp_path) -> tuple[Path, Path]:
    """A model and its weights."""
    guide = captured.gpt2(layers=1)
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx", stateful=False, external_data=True)
    assert report.weights is not None
    return report.path, report.weights


def test_weights_beside_a_file_that_are_missing_or_altered_are_an_error_of_their_own(beside):
    path, weights = beside
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExportError, match=r"weights was changed since it was written"):
        Session(path)
    weights.write_bytes(content[:-8])
    with pytest.raises(ExportError, match=r"weights was changed since it was written"):
        Session(path)
    weights.unlink()
    with pytest.raises(ExportError, match="are not beside it"):
        Session(path)
