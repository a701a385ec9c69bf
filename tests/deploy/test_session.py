"""The file alone, in onnxruntime.

B batch, T time, V vocabulary
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thesean
from tests import captured, models
from tests.exported import hybrid
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.errors import DataError, ExportError
from thesean.passes.bound_positions import BoundPositions

pytestmark = pytest.mark.thorough

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(module, stateful file, stateless file) of one converted model."""
    guide = captured.gpt2(layers=1)
    module = hybrid(guide, "linear-attention")
    assert BoundPositions("wrap")(module).modified
    folder = tmp_path_factory.mktemp("files")
    stateful = export(module, guide.signature, folder / "state.onnx").path
    stateless = export(module, guide.signature, folder / "plain.onnx", stateful=False).path
    return module, Session(stateful), Session(stateless)


def test_zero_states_have_the_declared_shapes(files):
    _, session, plain = files
    zeros = session.zero_state(3)
    assert {n: (z.dtype, z.shape) for n, z in zeros.items()} == {
        "state_in_0": (np.float32, (3, 2, 16, 9)),
        "state_in_1": (np.int64, (3,)),
    }
    assert not any(z.any() for z in zeros.values())
    assert session.is_stateful
    assert not plain.is_stateful
    assert plain.zero_state(3) == {}


def test_chunks_with_the_state_carried_equal_torch_on_the_whole_sequence(files):
    module, session, _ = files
    ids_BT = models.tokens(3, 30)
    with torch.no_grad():
        expected = module(input_ids=ids_BT)["logits"].numpy()
    state, parts = None, []
    for piece in ids_BT.split([1, 5, 1, 10, 13], 1):
        outputs, state = session.run({"input_ids": piece.numpy()}, state)
        parts.append(outputs["logits"])
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert state["state_in_1"].tolist() == [30] * 3


def test_dropped_positions_are_dropped_after_saving_and_in_the_file_in_one_step_or_many(tmp_path):
    recipe = {**thesean.Recipe.named("fast").model_dump(), "positions": "drop"}
    guide = models.gpt2(1)
    compiled = thesean.compile(guide, "mingru", data=models.token_batches(), recipe=recipe, progress=False)
    assert "positions past the guide's table: drop" in compiled.report.notes
    loaded = thesean.load(compiled.save(tmp_path / "saved"))
    ids_BT = models.tokens(2, 80)  # of a guide with 64 positions
    with torch.no_grad():
        expected = loaded(ids_BT).logits.numpy()
        assert np.array_equal(compiled(ids_BT).logits.numpy(), expected)
        assert (compiled(ids_BT).logits[:, :64] == compiled(ids_BT[:, :64]).logits).all()
    session = Session(loaded.export(tmp_path / "m.onnx").path)
    assert session.is_stateful
    whole = session.run({"input_ids": ids_BT.numpy()})[0]["logits"]
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    state, parts = None, []
    for piece in ids_BT.split([60, *[1] * 20], 1):
        outputs, state = session.run({"input_ids": piece.numpy()}, state)
        parts.append(outputs["logits"])
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=1e-4, atol=1e-4)


def greedy(module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(module(input_ids=torch.tensor([ids]))["logits"][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_text_is_the_torch_modules_with_and_without_state(files):
    module, session, plain = files
    expected = greedy(module, PROMPT, 100)  # past the guide's 64 positions
    assert len(set(expected)) > 1
    assert session.generate(PROMPT, 100) == expected
    assert plain.generate(PROMPT, 30) == expected[:30]


def test_a_state_costs_one_prefill_and_then_a_token_each(files, monkeypatch):
    _, session, plain = files
    lengths: dict[str, list[int]] = {"state": [], "plain": []}
    for name, one in (("state", session), ("plain", plain)):

        def run(inputs, state=None, original=one.run, seen=lengths[name]):
            seen.append(inputs["input_ids"].shape[1])
            return original(inputs, state)

        monkeypatch.setattr(one, "run", run)
        one.generate(PROMPT, 3)
    assert lengths == {"state": [5, 1, 1], "plain": [5, 6, 7]}


def test_nothing_is_generated_from_nothing(files):
    with pytest.raises(DataError, match="the prompt is empty"):
        files[1].generate([], 5)
    assert files[1].generate(PROMPT, 0) == []


def test_inputs_that_do_not_fit_are_told_quietly(files, capfd):
    _, session, _ = files
    with pytest.raises(DataError, match="missing input 'input_ids'"):
        session.run({"ids": np.zeros((1, 2))})
    with pytest.raises(DataError, match=r"input_ids: expected the shape \(batch, time\), found \(1, 2, 2\)"):
        session.run({"input_ids": np.zeros((1, 2, 2))})
    assert capfd.readouterr().err == ""


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"m\.onnx is no ONNX model"):
        Session(tmp_path / "m.onnx")


def test_what_would_be_ignored_or_changed_is_refused(files):
    _, session, plain = files
    ids_BT = np.array([[1, 2]])
    for inputs, message in (
        ({"input_ids": ids_BT, "attention_mask": ids_BT}, "doesn't take 'attention_mask', so that it would be ignored"),
        ({"input_ids": ids_BT, **session.zero_state(1)}, "state_in_0 is a state, and no input: give it as state="),
        ({"input_ids": [[1.5, 2]]}, r"input_ids: expected numbers of int64, found 1\.5"),
        ({"input_ids": [[float("nan")]]}, "expected numbers of int64, found nan"),
        ({"input_ids": np.array([[2**63 + 1]], np.uint64)}, f"found {2**63 + 1}"),
        ({"input_ids": np.array([["2024-01-01"]], "M8[D]")}, r"an array of numbers, found one of datetime64\[D\]"),
        (ids_BT, r"inputs: expected arrays by name, {'input_ids': \.\.\.}, found a ndarray"),
    ):
        with pytest.raises(DataError, match=message):
            session.run(inputs)
    for same in ([[1.0, 2.0]], torch.tensor([[1, 2]]), ids_BT.astype(np.uint8)):
        np.testing.assert_array_equal(
            plain.run({"input_ids": same})[0]["logits"], plain.run({"input_ids": ids_BT})[0]["logits"]
        )


def test_a_name_and_a_number_that_mean_nothing_are_told(files, tmp_path):
    _, session, _ = files
    for asked, kind, message in (
        (lambda: Session(tmp_path), ExportError, r"is a folder; expected a file, such as .*model\.onnx"),
        (lambda: Session(tmp_path / "no.onnx"), ExportError, r"can't read .*no\.onnx: there is no such file"),
        (lambda: Session(None), ExportError, "expected a path, found NoneType"),  # type: ignore[arg-type]
        (lambda: Session(session.path, "2"), DataError, "threads: expected a whole number"),  # type: ignore[arg-type]
        (lambda: session.zero_state(0), DataError, "batch: expected a whole number of at least 1, found 0"),
        (lambda: session.zero_state(1.0), DataError, r"found 1\.0"),
        (lambda: session.shape("ids"), DataError, "the file has no 'ids'; it has: "),
        (lambda: session.dtype("ids"), DataError, "the file has no 'ids'; it has: "),
        (lambda: session.flush({"input_ids": [[1]]}, {}), DataError, "outputs are not late"),
    ):
        with pytest.raises(kind, match=message):
            asked()


@pytest.mark.parametrize("number", [-1, models.VOCABULARY])
def test_ids_that_no_table_holds_are_refused_where_onnxruntime_would_read_its_last_row(files, number):
    ids_BT = models.tokens(2, 5).numpy()
    ids_BT[1, 3] = number
    for session in files[1:]:
        with pytest.raises(DataError, match=f"input_ids holds {number}; expected ids from 0 to"):
            session.run({"input_ids": ids_BT})


class FromTheEnd(torch.nn.Module):
    """Looks tokens up by a subscript, of which -1 is the last row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids] * 2


def test_ids_that_torch_reads_from_a_tables_end_are_read_there_by_the_file_too(tmp_path):
    guide, ids_BT = FromTheEnd(), torch.tensor([[0, -1, 8], [3, -9, 2]])
    report = thesean.export_guide(guide, tmp_path / "m.onnx", example_inputs=(ids_BT.abs() % 9,))
    found = Session(report.path).run({"ids": ids_BT.numpy()})[0]["output"]
    np.testing.assert_allclose(found, guide(ids_BT).detach().numpy(), rtol=1e-5)
