"""Networks of one guide, side by side: who is measured, on what they are judged, and what is refused.

N rows, D width
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests.docs import my_models
from tests.models import VOCABULARY, gpt2
from tests.report.points import FOUND
from thesean.deploy.session import Session
from thesean.deploy.timing import costs
from thesean.distill.data import Reading
from thesean.errors import DataError, ExportError
from thesean.judged import Asked, Judged
from thesean.passes.capture.capture import capture
from thesean.trade_offs import _not_run, trade_offs
from thesean.with_guide import with_guide

SMALL: dict[str, Any] = {"batches": (1, 3), "quantize": (None,), "repeats": 2}


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(8, 3)).eval()


def rows(seed: int, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    xs_ND = [torch.randn(16, 8, generator=generator) for _ in range(count)]
    return [(x_ND, x_ND[:, :3].argmax(-1)) for x_ND in xs_ND]


@pytest.fixture(scope="module")
def converted() -> thesean.Converted:
    return thesean.compile(
        classifier(), "mlp", data=rows(1), eval_data=rows(2, 1), parts=["0", "1"], recipe="fast", progress=False
    )


@pytest.fixture(scope="module")
def found(converted) -> thesean.TradeOffs:
    pytest.importorskip("onnxruntime")
    return trade_offs(converted, data=rows(2), **SMALL)


def test_networks_of_half_precision_are_measured_by_their_files_which_are_not():
    pytest.importorskip("onnxruntime")
    data = [x_ND.half() for x_ND, _ in rows(1)]
    made = thesean.compile(classifier().half(), "mlp", data=data, parts=["0"], recipe="fast", progress=False)
    found = trade_offs(made, data=data, quantize=(None, "int8"), batches=(1,), repeats=2)
    assert not found.notes
    assert [p.name for p in found] == ["guide", "guide, int8", "converted", "converted, int8"]
    assert all(place.prefill is not None for p in found for place in p.served)


def test_the_guide_every_hybrid_and_the_conversion_are_judged_and_measured(converted, found):
    assert [(p.name, p.kind, p.replaced) for p in found] == [
        ("guide", "guide", 0), ("1 of 2", "hybrid", 1), ("converted", "converted", 2),
    ]  # fmt: skip
    assert found.places == (("forward", None, 1), ("forward", None, 3))
    assert [p.params for p in found] == [c.report.params for c in converted.frontier]
    assert found[0].divergence == 0
    assert found[1].divergence > 0
    for point in found:
        assert point.token_kind is None
        assert point.file_bytes > 4 * point.params
        for served in point.served:
            assert served.length is served.token is None
            assert served.prefill is not None
            assert 0 < served.prefill.p20_ms <= served.prefill.median_ms <= served.prefill.p80_ms
            assert served.state_bytes == 0
            assert served.peak_memory_mib is None or 1 < served.peak_memory_mib < 1000


def test_labels_that_fit_bring_loss_and_accuracy(found):
    assert found.judged == "judged on 64 rows, loss cross_entropy"
    model, batches = classifier(), rows(2)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x_ND), y_N) for x_ND, y_N in batches]
        right = [(model(x_ND).argmax(-1) == y_N).float().mean() for x_ND, y_N in batches]
    assert found[0].loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert found[0].metric == pytest.approx(torch.stack(right).mean().item())


def test_a_file_is_judged_as_its_network_is(converted, tmp_path):
    pytest.importorskip("onnxruntime")
    path = converted.frontier[1].export(tmp_path / "half.onnx").path
    guide = converted.frontier[0]
    judged = Judged(guide.module, guide.signature, rows(2), Reading(None, None), Asked())
    inside, outside = judged.module(converted.frontier[1].module), judged.file(Session(path))
    assert outside.divergence == pytest.approx(inside.divergence, rel=1e-3)
    assert outside.loss == pytest.approx(inside.loss, rel=1e-5)


def test_what_is_asked_for_goes_before_what_is_guessed(converted):
    guide = converted.frontier[0]
    asked = Asked(loss=lambda output, batch: output.sum() * 0 + 7)
    assert Judged(guide.module, guide.signature, rows(2), Reading(None, None), asked).module(guide.module).loss == 7


def test_outputs_are_compared_as_is_asked(converted):
    guide, half = converted.frontier[0], converted.frontier[1]
    ways: list[Any] = [None, {"output": "mse"}]
    judged = [Judged(guide.module, guide.signature, rows(2), Reading(None, None), Asked(outputs=w)) for w in ways]
    assert [j.unit for j in judged] == ["nats", "shares of the variance"]
    one, other = (j.module(half.module).divergence for j in judged)
    assert one != other


def test_a_language_model_that_decodes_is_asked_for_the_next_token_and_another_for_nothing():
    model, batches = my_models.guide(), my_models.batches(2)
    captured = capture(model, batches[0])
    for decodes, expected in ((True, thesean.next_token(model(**batches[0]), batches[0]).item()), (False, None)):
        asked = Asked(decodes=decodes)
        judged = Judged(captured.graph_module, captured.signature, batches[:1], Reading(None, None), asked)
        assert judged.unit == "nats"
        loss = judged.module(captured.graph_module).loss
        assert loss == expected if expected is None else loss == pytest.approx(expected, rel=1e-5)


def test_a_tagger_of_tokens_that_decodes_is_no_language_model():
    """Its outputs have a row for each token too, and fewer classes than there are tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 5))
    batch = torch.randint(0, VOCABULARY, (4, 12))
    captured = capture(model, batch)
    judged = Judged(captured.graph_module, captured.signature, [batch], Reading(None, None), Asked(decodes=True))
    assert judged.module(captured.graph_module).loss is None


def test_data_made_by_the_seed_that_is_drawn_by_is_not_taken_for_outputs_that_never_vary():
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))}
    batch["input_ids"][0, :2] = torch.tensor([0, VOCABULARY - 1])
    captured = capture(gpt2(1), batch)
    batch = captured.signature.random_inputs(captured.signature.check(batch))
    judged = Judged(captured.graph_module, captured.signature, [batch], Reading(None, None), Asked())
    assert judged.unit == "nats"


@pytest.mark.slow
def test_a_saved_conversion_stands_beside_its_guide_again_and_whole_numbers_are_judged_as_they_run(converted, tmp_path):
    pytest.importorskip("onnxruntime")
    converted.save(tmp_path / "run" / "converted")
    found = trade_offs(
        {"mine": tmp_path / "run"}, guide=classifier(), data=rows(2), batches=[1], quantize=["int8"], repeats=1
    )
    assert [(p.name, p.form) for p in found] == [
        ("guide", "float32"), ("guide, int8", "int8"), ("mine", "float32"), ("mine, int8", "int8"),
    ]  # fmt: skip
    assert 0 < found[1].divergence < 0.1
    assert found[3].divergence != found[2].divergence


def test_a_folder_alone_is_no_trade_off(converted, tmp_path):
    converted.save(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved: a saved conversion holds neither its guide nor hybrids"):
        trade_offs(tmp_path / "saved", data=rows(2))


def test_a_conversion_comes_together_with_its_own_guide_alone(converted, tmp_path):
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    joined = with_guide(loaded, classifier(), data=rows(2))
    x_ND = rows(2)[0][0]
    assert len(joined.frontier) == 2
    assert joined.frontier[-1] is joined
    assert joined.frontier[0].plan.replaced == ()
    torch.testing.assert_close(joined.frontier[0](x_ND), classifier()(x_ND))
    torch.testing.assert_close(joined(x_ND), converted(x_ND))
    with pytest.raises(DataError, match="its weights are not those that were converted"):
        with_guide(loaded, classifier(seed=1), data=rows(2))
    with pytest.raises(DataError, match="expected a model with the inputs"):
        with_guide(loaded, my_models.guide(), data=my_models.batches())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"lengths": 64}, "lengths: expected whole numbers"),
        ({"batches": (0,)}, "batches: expected whole numbers"),
        ({"repeats": 0}, "repeats: expected whole numbers"),
        ({"quantize": "int8"}, "quantize: expected a list"),
        ({"data": []}, "data is empty"),
    ],
)
def test_wrong_arguments_are_told_by_name(wrong, told, converted, monkeypatch):
    monkeypatch.setattr(thesean.Converted, "export", unwritable)
    with pytest.raises(DataError, match=told):
        trade_offs(converted, **({"data": rows(2)} | wrong))


def unwritable(*_: Any, **__: Any) -> None:
    raise ExportError("no room")


def test_where_nothing_can_be_exported_it_says_why(converted, monkeypatch):
    monkeypatch.setattr(thesean.Converted, "export", unwritable)
    with pytest.raises(ExportError, match="no network could be exported: guide is left out: no room; 1 of 2"):
        trade_offs(converted, data=rows(2))


def test_several_networks_need_the_same_batches_and_names_of_their_own(converted):
    with pytest.raises(DataError, match="judged on the same batches"):
        trade_offs({"a": converted, "b": converted.frontier})
    with pytest.raises(DataError, match="'guide' is the guide's own name"):
        trade_offs({"guide": converted}, data=rows(2))


def test_where_a_file_does_not_run_a_note_says_so():
    told = list(_not_run(FOUND))
    assert told[0].startswith("no figure at 8 tokens, batch 1 for converted, int8: ")
    assert [line.partition(",")[0] for line in told] == ["no figure at 8 tokens", "no figure at 64 tokens"]


def test_a_file_of_text_has_tokens_states_and_a_peak_that_grows(tmp_path: Path, monkeypatch):
    pytest.importorskip("onnxruntime")
    model, batches = my_models.guide(), my_models.batches()
    path = thesean.export_guide(model, tmp_path / "guide.onnx", data=batches).path
    signature = capture(model, batches[0]).signature
    monkeypatch.setattr(costs, "_TOGETHER_MIB", 0)  # memory is given back between turns
    found, kinds = costs.costs_of_files({"guide": path}, signature, [256, 4], [2], 1)
    assert kinds == {"guide": "state"}
    short, long = found["guide"]
    assert (short.batch, short.length, long.length) == (2, 4, 256)
    assert short.token is not None
    assert long.footprint is not None
    # two layers, keys and values: 2 rows, 256 steps of 16 floats, and which of the steps are tokens
    assert long.footprint.state_bytes == pytest.approx(4 * 2 * 256 * 16 * 4, rel=0.02)
    assert short.footprint is not None
    if long.footprint.peak_mib is not None:
        assert long.footprint.peak_mib >= short.footprint.peak_mib
