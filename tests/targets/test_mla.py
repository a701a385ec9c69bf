"""B batch, T time, D width, R width of the latent, H heads, C width of a head"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thesean
from tests import models
from tests.targets.build import build
from tests.targets.test_gqa import BOTH, KINDS, error_of, inputs, make_part
from thesean.deploy.session import Session
from thesean.errors import TargetMismatchError
from thesean.targets import PartFacts, Target

__all__ = ["make_part"]  # a fixture


def solved(part: PartFacts, data: bool = True, **options: Any) -> Any:
    module = build("mla", part, **options).eval()
    assert module.copy_from(part) == ("query", "output")
    if data:
        module.prepare(part, [(x, x) for x in inputs()])
    return module


@BOTH
@KINDS
def test_the_full_rank_is_the_guide(mixing, kind, make_part):
    part = make_part(mixing, kind)
    for data in (False, True):
        assert error_of(solved(part, data, rank=16), part) < 1e-5


def test_no_more_inputs_than_keys_and_values_need_no_wider_latent(make_part):
    part = make_part(heads=1)
    assert error_of(solved(part, rank=8), part) < 1e-5
    with pytest.raises(TargetMismatchError, match=r"at most 8, .*, found rank=9\. Set rank=8"):
        build("mla", part, rank=9)


@BOTH
@KINDS
def test_a_wider_latent_loses_less_and_what_was_solved_on_data_least(mixing, kind, make_part):
    part = make_part(mixing, kind)
    errors = [error_of(solved(part, rank=rank), part) for rank in (2, 6, 12)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.8 * error_of(solved(part, data=False, rank=6), part)


def test_what_activations_never_do_needs_no_rank(make_part):
    part = make_part()
    basis_RD = torch.randn(5, 16)
    x_BTD = torch.randn(8, 12, 5) @ basis_RD + 1
    module = build("mla", part, rank=5).eval()
    module.copy_from(part)
    module.prepare(part, [(x_BTD, x_BTD)])
    facts = part.attention
    wanted = facts.output.of(facts.mixed_values(x_BTD, causal=True))
    torch.testing.assert_close(module(x_BTD), wanted, rtol=1e-3, atol=1e-3)


def test_half_of_keys_and_values_is_the_default(make_part):
    assert build("mla", make_part(heads=2)).config()["rank"] == 8


def test_a_part_without_attention_is_refused(sequence_part):
    with pytest.raises(
        TargetMismatchError, match="expected one attention whose keys and values are remembered, found a part w"
    ):
        build("mla", sequence_part())


@pytest.mark.parametrize(
    ("target", "held"),
    [(Target("mla", rank=6), [("batch", "past", 6)]), (Target("gqa", kv_heads=1), [("batch", 1, "past", 8)] * 2)],
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_files_cache_is_what_is_remembered(target, held, tmp_path):
    pytest.importorskip("onnxruntime")
    data = [{"input_ids": models.tokens(4, 24, seed=seed)} for seed in range(2)]
    converted = thesean.compile(models.llama(layers=1), target, data=data, recipe="fast", progress=False)
    exported = converted.export(tmp_path / "model.onnx", stateful="yes")  # compared with the whole, in chunks too
    file = Session(exported.path)
    shapes = [shape for name in file.states if len(shape := file.shape(name)) > 2]
    assert shapes == held
    assert file.has_rows
