"""Files of networks that keep an attention: keys and values are state, in onnxruntime as in torch.

B batch, T time
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import thesean
from tests import captured, models
from tests.causal_guides import ENDLESS, FAMILIES, MIXED, WINDOW, attending, family
from tests.deploy.test_export import dims
from thesean.deploy.export import ExportReport, export
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays
from thesean.errors import ExportError
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.hybrid import bound_positions, build_hybrid
from thesean.passes.plan.make_plan import make_plan

CACHED = [*FAMILIES, *MIXED]
CHUNKED = ((1,) * 12, (1, 5, 6), (12,))


class File:
    """A network and what was written of it."""

    def __init__(self, module: fx.GraphModule, signature: Signature, path: Path) -> None:
        self.module = module
        self.report: ExportReport = export(module, signature, path, train_length=16)
        self.session = Session(path)

    def chunks(self, inputs: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> np.ndarray:
        """The first output in chunks with the state carried."""
        state: Arrays | None = None
        parts = []
        for piece in zip(*(value.split(sizes, 1) for value in inputs.values()), strict=True):
            found, state = self.session.run({n: v.numpy() for n, v in zip(inputs, piece, strict=True)}, state)
            parts.append(found[self.session.outputs[0]])
        return np.concatenate(parts, 1)

    @torch.no_grad()
    def whole(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        return self.module(**inputs)["logits"].numpy()

    def check(self, inputs: dict[str, torch.Tensor], chunked: tuple[tuple[int, ...], ...] = CHUNKED) -> None:
        """At every step, or where there is a mask at every token."""
        want = self.whole(inputs)
        tokens = inputs.get("attention_mask", torch.ones(want.shape[:2])).numpy() > 0
        for sizes in chunked:
            np.testing.assert_allclose(self.chunks(inputs, sizes)[tokens], want[tokens], rtol=1e-4, atol=1e-4)


def whole_file(guide: Captured, path: Path) -> File:
    return File(guide.graph_module, guide.signature, path)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> File:
    """With a mask: padding, tables of positions, both."""
    return whole_file(family("gpt2", masked=True), tmp_path_factory.mktemp("files") / "gpt2.onnx")


def test_names_and_dimensions_tell_what_is_remembered(gpt2):
    found = dims(gpt2.report.path)
    assert gpt2.report.stateful
    assert gpt2.report.inputs == ("input_ids", "attention_mask", *(f"state_in_{k}" for k in range(6)))
    assert found["state_in_0"] == ["batch", "past"]  # which steps held a token
    assert [found[f"state_in_{k}"] for k in range(1, 5)] == [["batch", 2, "past", 8]] * 4  # keys, values, keys, values
    assert found["state_in_5"] == found["state_out_5"] == ["batch"]  # steps so far
    assert found["state_out_1"][0] == "batch"
    assert found["state_out_1"][1::2] == [2, 8]
    assert {n: z.shape for n, z in gpt2.session.zero_state(3).items()} == {
        "state_in_0": (3, 0),
        **{f"state_in_{k}": (3, 2, 0, 8) for k in range(1, 5)},
        "state_in_5": (3,),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_in_onnxruntime_equal_the_whole_in_torch(gpt2, batch):
    mask_BT = torch.ones(batch, 12, dtype=torch.int64)
    gpt2.check({"input_ids": models.tokens(batch, 12), "attention_mask": mask_BT})


def test_rows_that_are_padded_anywhere_are_what_they_would_be_alone(gpt2):
    mask_BT = torch.ones(4, 12, dtype=torch.int64)
    mask_BT[0, :4] = mask_BT[1, 5:8] = mask_BT[2, -3:] = 0
    gpt2.check({"input_ids": models.tokens(4, 12), "attention_mask": mask_BT})


def test_a_row_starts_anew_while_the_others_go_on(gpt2):
    ids_BT = models.tokens(3, 14)
    ones_BT = torch.ones_like(ids_BT)

    def step(start: int, end: int, state: Arrays | None) -> tuple[np.ndarray, Arrays]:
        given = {"input_ids": ids_BT[:, start:end].numpy(), "attention_mask": ones_BT[:, start:end].numpy()}
        found, after = gpt2.session.run(given, state)
        return found["logits"], after

    _, state = step(0, 6, None)
    for value in state.values():
        value[1] = 0
    parts = []
    for t in range(6, 14):
        logits, state = step(t, t + 1, state)
        parts.append(logits)
    got = np.concatenate(parts, 1)
    whole = gpt2.whole({"input_ids": ids_BT, "attention_mask": ones_BT})[:, 6:]
    anew = gpt2.whole({"input_ids": ids_BT[:, 6:], "attention_mask": ones_BT[:, 6:]})
    for row, want in ((0, whole[0]), (1, anew[1]), (2, whole[2])):
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CACHED)
def test_a_guide_of_each_family_decodes_in_onnxruntime(tmp_path, name, masked):
    file = whole_file(family(name, masked=masked), tmp_path / "m.onnx")
    assert file.report.stateful
    assert file.report.note == ""
    assert max(c.max_abs_error for c in file.report.checks) < 1e-4
    for batch in (1, 3):
        inputs = {"input_ids": models.tokens(batch, 12)}
        if masked:
            inputs["attention_mask"] = torch.ones(batch, 12, dtype=torch.int64)
            inputs["attention_mask"][0, : 4 * (batch - 1)] = 0
        file.check(inputs)
    if name in ENDLESS and not masked:  # longer than max_position_embeddings
        file.check({"input_ids": models.tokens(2, 90)}, ((80, 1, 9),))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("narrow", {"granularity": "sublayer"}),
        ("narrow-heads", {}),
        ("copy", {"merge": 2}),
        ({"*.0": "gru", "*.1": "keep"}, {}),
        ({"*.0": "narrow-heads", "*.1": "linear-attention"}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_causal_conversion_has_a_state(tmp_path, name, target, settings):
    guide = family(name)
    torch.manual_seed(0)
    module = build_hybrid(make_plan(guide, target, **settings)).graph_module.eval()
    bound_positions(module)
    file = File(module, guide.signature, tmp_path / "m.onnx")
    assert file.report.stateful
    assert "without state" not in file.report.note
    file.check({"input_ids": models.tokens(3, 12)})


@pytest.mark.slow
def test_convolutions_that_are_kept_beside_a_converted_attention_have_states(tmp_path):
    guide = family("lfm2", masked=True)
    torch.manual_seed(0)
    module = build_hybrid(make_plan(guide, {"*.self_attn": "gru", "*": "keep"})).graph_module.eval()
    file = File(module, guide.signature, tmp_path / "m.onnx")
    found = dims(file.report.path)
    assert [found[f"state_in_{k}"] for k in (0, 2)] == [["batch", 32, 2]] * 2  # of a kernel of three
    mask_BT = torch.ones(3, 12, dtype=torch.int64)
    mask_BT[0, :4] = 0
    file.check({"input_ids": models.tokens(3, 12), "attention_mask": mask_BT})


def test_every_member_of_a_frontier_has_a_state(tmp_path):
    compiled = thesean.compile(
        models.gpt2(), "linear-attention", data=models.token_batches(), recipe="fast", progress=False
    )
    for k, member in enumerate(compiled.frontier):
        report = member.export(tmp_path / f"{k}.onnx")
        assert report.stateful
        assert len(report.inputs) == 1 + (2 * (2 - k) + (k < 2)) + k + 1  # caches, states of the others, steps


def test_the_guide_itself_is_a_file_with_a_state(tmp_path):
    guide = models.gpt2(1)
    report = thesean.export_guide(guide, tmp_path / "guide.onnx", data=models.token_batches())
    assert report.stateful
    prompt = models.tokens(1, 9)
    everything = prompt
    with torch.no_grad():
        for _ in range(70):  # past the guide's table of 64: its last row
            positions = torch.arange(everything.shape[1]).clamp(max=63)
            logits_BTV = guide(everything, position_ids=positions.unsqueeze(0)).logits
            everything = torch.cat([everything, logits_BTV[:, -1:].argmax(-1)], 1)
    assert Session(report.path).generate(prompt[0].tolist(), 70) == everything[0, 9:].tolist()


class Mixed(nn.Module):
    """ids_BT -> logits_BTV: an attention with a window, behind it one that is refused."""

    def __init__(self) -> None:
        super().__init__()
        from tests.causal_guides import Attending

        self.near, self.odd = Attending("windowed", WINDOW), Attending("strided")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.near(ids) + self.odd(ids)


def test_one_attention_that_no_cache_stands_for_leaves_the_file_without_state_and_says_why(tmp_path):
    from thesean.passes.capture.capture import capture

    guide = capture(models.seeded(Mixed), {"ids": models.tokens(3, 11)})
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert report.note.startswith("without state: odd: expected queries that see all earlier keys")
    with pytest.raises(ExportError, match=r"a stateful export is not possible: cache attention: odd: expected queries"):
        export(guide.graph_module, guide.signature, tmp_path / "no.onnx", stateful=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_in_half_precision_the_cache_is_half_as_large(tmp_path):
    guide = attending("fused")
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx", dtype=torch.float16)
    assert report.stateful
    state = Session(report.path).zero_state(1)
    assert {n: z.dtype for n, z in state.items()} == {
        "state_in_0": np.bool_,
        "state_in_1": np.float16,
        "state_in_2": np.float16,
    }


def test_a_file_whose_one_count_serves_all_rows_still_starts_and_runs(tmp_path):
    """As they were written before rows had counts of their own."""
    import onnx

    text: Any = """
        <ir_version: 10, opset_import: ["" : 20]>
        old (int64[batch, time] ids, int64[1] state_in_0) => (int64[batch, time] y, int64[1] state_out_0) {
            y = Add (ids, state_in_0)
            steps = Shape <start = 1, end = 2> (ids)
            state_out_0 = Add (state_in_0, steps)
        }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "old.onnx")
    session = Session(tmp_path / "old.onnx")
    assert session.zero_state(3)["state_in_0"].shape == (1,)
    _, state = session.run({"ids": np.zeros((3, 4), np.int64)})
    found, _ = session.run({"ids": np.zeros((3, 2), np.int64)}, state)
    assert found["y"].tolist() == [[4, 4]] * 3


def test_encoders_stay_as_they_were(tmp_path):
    encoder = captured.bert()
    report = export(encoder.graph_module, encoder.signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert report.note.startswith("without state: no part carries a state")
