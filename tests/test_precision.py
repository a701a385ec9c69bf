"""Guides whose weights are not float32, against the same guides in float32.

B batch, T time, D width
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.exported import hybrid
from tests.kept_captures import capture
from tests.models import same_state, state_of, tokens, vectors
from thesean.deploy.export import export
from thesean.errors import ExportError
from thesean.passes.plan.make_plan import make_plan

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64

# of a divergence between a float32 guide and its hybrid: that of rounded weights, and of what is solved on them
NEAR = {BF16: 0.05, FP16: 0.01, FP64: 1e-3}


class Cell(nn.Module):
    """x_BTD -> logits_BTC through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.rnn, self.head = nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(torch.tanh(self.up(x)))[0])


class Mixed(nn.Module):
    """A stream and norms in float32, matrices in half precision, two layers of causal means over time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, mix in zip(self.norm, self.mix, strict=True):
            y = mix(norm(x).to(mix.weight.dtype))
            x = x + (y.cumsum(1) * 0.3).float()
        return x

    def to(self, dtype: torch.dtype) -> Mixed:  # type: ignore[override]
        self.mix.to(dtype)
        return self


class Case(NamedTuple):
    guide: Any
    batch: Any  # by seed
    target: Any


CASES = {
    "gpt2": Case(lambda: models.gpt2(1), lambda seed: {"input_ids": tokens(seed=seed)}, "rnn"),
    "llama": Case(
        lambda: models.llama(1),
        lambda seed: {"input_ids": tokens(seed=seed)},
        thesean.Target("linear-attention", window=4),
    ),
    "bert": Case(
        lambda: models.bert(1),
        lambda seed: {
            "input_ids": tokens(seed=seed),
            "attention_mask": torch.ones(4, models.LENGTH, dtype=torch.long).tril(7),
        },
        thesean.Target("gru"),
    ),
    "convnet": Case(models.convnet, lambda seed: vectors(4, 1, 6, 6, seed=seed), "narrow"),
    "gru": Case(lambda: models.seeded(Cell), lambda seed: vectors(4, 10, 6, seed=seed), "rnn"),
    "mixed": Case(lambda: models.seeded(Mixed), lambda seed: vectors(4, 10, 8, seed=seed), "gru"),
    "mlp": Case(lambda: models.gpt2(1), lambda seed: {"input_ids": tokens(seed=seed)}, "narrow"),
}
SOON = {"gpt2", "gru", "mixed"}  # half, double and mixed precision while one works


def cases(*pairs: tuple[str, torch.dtype]) -> list[Any]:
    return [pytest.param(*p, marks=() if p[0] in SOON else pytest.mark.thorough) for p in pairs]


WITH_PLANS = cases(("gpt2", FP16), ("llama", BF16), ("bert", BF16), ("gru", FP64), ("mixed", BF16), ("mlp", BF16))
CONVERTED = cases(("gpt2", FP16), ("llama", BF16), ("convnet", BF16), ("gru", FP64), ("mixed", BF16))


def data_of(name: str, dtype: torch.dtype, count: int = 4) -> list[Any]:
    kept = torch.float32 if name == "mixed" else dtype
    batches = [CASES[name].batch(seed) for seed in range(count)]
    return [b.to(kept) if isinstance(b, torch.Tensor) else b for b in batches]


@cache
def facts_of(name: str, dtype: torch.dtype) -> list[Any]:
    """What is read off the guide, without weights."""
    guide = CASES[name].guide().to(dtype)
    bound = make_plan(capture(guide, data_of(name, dtype)[0]), CASES[name].target)
    found: list[Any] = [bound.plan.parts]
    for site in (s for part in bound.parts for s in part.sites):
        facts, attention, mlp = site.facts, site.facts.attention, site.facts.mlp
        found.append((facts.path, facts.mixing, facts.input_shape, facts.nonnegative, site.masks))
        if attention is not None:
            found.append((attention.heads, attention.kv_heads, attention.plain, round(attention.scale, 5)))
            if attention.rotation is not None:
                # the guide's own table of frequencies was rounded with its weights
                angles = [float(f"{angle:.1e}") for angle in attention.rotation.angle]
                found.append((*attention.rotation[:2], angles))
            assert attention.query.weight_OI.dtype == dtype
        if mlp is not None:
            assert mlp.up.weight_OI.data_ptr() in {p.data_ptr() for p in guide.parameters()}, "shared, not copied"
            found.append((mlp.activation, mlp.width, mlp.gate is None))
    return found


@cache
def converted(name: str, dtype: torch.dtype) -> Any:
    """By the recipe "fast"; the guide must come out of it as it went in."""
    guide = CASES[name].guide().to(dtype)
    before = state_of(guide)
    made = thesean.compile(
        guide, CASES[name].target, data=data_of(name, dtype), eval_data=data_of(name, dtype, 6)[4:], recipe="fast",
        progress=False,
    )  # fmt: skip
    assert same_state(guide, before)
    return made


def floats_of(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


@pytest.mark.parametrize(("name", "dtype"), WITH_PLANS)
def test_the_same_is_read_off_a_guide_in_every_precision(name, dtype):
    assert facts_of(name, dtype) == facts_of(name, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), CONVERTED)
def test_a_conversion_keeps_the_precision_and_is_as_near_to_the_guide_as_in_float32(name, dtype):
    own, wide = converted(name, dtype), converted(name, torch.float32)
    assert floats_of(own.module) == ({torch.float32, dtype} if name == "mixed" else {dtype})
    divergence, wanted = (c.report.converted["divergence"] for c in (own, wide))
    assert abs(divergence - wanted) <= NEAR[dtype] * wanted + (1e-3 if dtype != FP64 else 0)
    assert any(note.startswith("weights in") for note in own.report.notes)


@pytest.mark.parametrize(("name", "dtype"), CONVERTED)
def test_a_conversion_is_saved_and_loaded_bit_for_bit(name, dtype, tmp_path):
    own = converted(name, dtype)
    loaded = thesean.load(own.save(tmp_path / "saved"))
    assert same_state(loaded.module, state_of(own.module))
    assert all(v.dtype == own.module.state_dict()[k].dtype for k, v in loaded.module.state_dict().items())
    batch = data_of(name, dtype)[0]
    given = (
        batch if isinstance(batch, dict) else dict(zip([s.name for s in own.signature.inputs], [batch], strict=True))
    )
    with torch.no_grad():
        first, second = (next(iter(_leaves(c(**given)))) for c in (own, loaded))
    assert torch.equal(first, second)


def _leaves(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output.values())


@pytest.mark.parametrize(
    ("name", "dtype", "stateful"),
    [
        pytest.param("llama", BF16, True, marks=pytest.mark.thorough),
        ("gru", FP64, True),
        ("mixed", BF16, True),
        pytest.param("gpt2", FP16, True, marks=pytest.mark.thorough),
        pytest.param("convnet", BF16, False, marks=pytest.mark.thorough),
    ],
)
def test_a_file_is_in_float32_unless_asked(name, dtype, stateful, tmp_path):
    report = converted(name, dtype).export(tmp_path / "model.onnx")
    assert report.stateful == stateful
    assert (report.dtype, report.tolerance) == ("float32", 1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("gru", FP64), pytest.param("gpt2", FP16, marks=pytest.mark.thorough)])
def test_a_file_is_in_float16_where_asked(name, dtype, tmp_path):
    from thesean.deploy.session import Session

    report = converted(name, dtype).export(tmp_path / "model.onnx", dtype=FP16 if name == "gpt2" else "float16")
    assert "float16, with state" in str(report)
    batch = data_of(name, FP16)[0]
    given = batch if isinstance(batch, dict) else {"x": batch}
    outputs, state = Session(report.path).run({k: v.numpy() for k, v in given.items()})
    assert {str(v.dtype) for v in outputs.values()} == {"float16"}
    assert {str(v.dtype) for v in state.values()} <= {"float32", "int64"}


@pytest.mark.parametrize("target", ["gru", "lstm", "elman"])
def test_a_cell_between_other_layers_is_served_from_a_float16_file(target, tmp_path):
    """onnxruntime died of it."""
    guide = captured.gpt2()
    report = export(hybrid(guide, target), guide.signature, tmp_path / "model.onnx", dtype=FP16)
    assert report.dtype == "float16"
    assert not report.note


class TableOfSizes(nn.Module):
    """Multiplies by a table that it makes of the length, in torch's own precision."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle_TD = torch.arange(x.shape[1], device=x.device)[:, None] * 1000.0 ** (-torch.arange(6) / 6)
        first, second = self.into(x).chunk(2, -1)
        return self.out(torch.cat([first * angle_TD[:, :3].cos(), second], -1))


def test_a_table_that_is_made_of_sizes_is_cast_where_it_meets_a_network_in_float16(tmp_path):
    guide = capture(models.seeded(TableOfSizes), models.vectors(2, 9, 6))
    report = export(guide.graph_module, guide.signature, tmp_path / "model.onnx", dtype=FP16)
    assert report.dtype == "float16"


def test_a_file_in_a_precision_that_onnxruntime_has_no_kernels_of_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"expected torch\.float32 or torch\.float16, found torch\.bfloat16.*Leave"):
        converted("gru", FP64).export(tmp_path / "model.onnx", dtype=BF16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "dtype"), cases(("llama", BF16), ("gru", FP16)))
def test_steps_bring_a_half_precision_hybrid_nearer_to_its_guide(name, dtype):
    guide = CASES[name].guide().to(dtype)
    before = state_of(guide)
    data, recipe = data_of(name, dtype, 6), {"steps": 40, "fine_tuning": {"learning_rate": 2e-3}}
    made = thesean.compile(guide, CASES[name].target, data=data, eval_data=data, recipe=recipe, progress=False)
    assert same_state(guide, before)
    assert floats_of(made.module) == {dtype}
    fast = made.report.stages[-1].divergence
    assert made.report.converted["divergence"] < 0.9 * fast


def test_an_adam_step_alone_is_less_than_bfloat16_holds_and_still_counts():
    """With learning rates so small that each weight moves by less than its own rounding in every single step."""
    guide = CASES["gru"].guide().to(BF16)
    small = {"steps": 60, "alignment": {"schedule": "none", "share": 0}, "fine_tuning": {"learning_rate": 3e-4}}
    made = thesean.compile(guide, "rnn", data=data_of("gru", BF16, 6), recipe=small, progress=False)
    assert made.report.converted["divergence"] < made.report.stages[-1].divergence


def test_a_float32_guide_is_trained_under_autocast_where_asked():
    made = thesean.compile(
        models.mlp(), "mlp", data=[vectors(8, 8, seed=k) for k in range(4)], progress=False,
        recipe={"steps": 4, "precision": "bfloat16"},
    )  # fmt: skip
    assert floats_of(made.module) == {torch.float32}
    assert made.report.recipe["precision"] == "bfloat16"
