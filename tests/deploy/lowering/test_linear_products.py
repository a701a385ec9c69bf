"""Linear attention as products in blocks: the kernel's numbers in onnxruntime, and when a file has them.

B batch, T time, H heads of queries, G heads of keys and values, F features, K width of a value
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import captured, exported
from tests.deploy.lowering.lean.test_lean import built
from thesean.deploy.describe_file import describe_file
from thesean.deploy.export import export
from thesean.deploy.lowering import choose_operators as choosing
from thesean.deploy.lowering.choose_operators import choose_operators
from thesean.deploy.lowering.linear_products import decays_by_head, linear_products
from thesean.errors import ExportError
from thesean.kernels.linear_attention import linear_attention_reference

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

F, K = 16, 5


def alone(heads: int, groups: int, rule: str = "gated", decays: str = "") -> Any:
    decay = {"linear": ""}.get(rule, f", float[B, T, {decays or groups}] g")
    beta = f", float[B, T, {groups}] beta" if rule == "gated_delta" else ""
    names = ["q", "k", "v", "s", *(["g"] if decay else []), *(["beta"] if beta else [])]
    state = f"float[B, {groups}, {F}, {K}]"
    return built(f"""alone (float[B, T, {heads * F}] q, float[B, T, {groups * F}] k, float[B, T, {groups * K}] v,
        {state} s{decay}{beta}) => (float[B, T, {heads * K}] out, {state} after)
    {{
        out, after = com.microsoft.LinearAttention <q_num_heads = {heads}, kv_num_heads = {groups}, scale = 1.0,
            update_rule = "{rule}"> ({", ".join(names)})
    }}""")


def run(model: Any, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(v) for v in session.run(None, {n: v.numpy() for n, v in feeds.items()})]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("portable", [True, False])
def test_the_function_is_the_kernel_whole_and_in_chunks(heads, groups, decays, portable):
    model = alone(heads, groups, "gated" if decays else "linear")
    assert linear_products(model, portable) == 1
    (function,) = model.functions.values()
    assert {n.domain for n in function.all_nodes()} == ({""} if portable else {"", "com.microsoft"})
    assert not decays_by_head(model)
    time, random = 150, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, time, n, w, generator=random) for n, w in ((heads, F), (groups, F), (groups, K)))
    g = -torch.rand(2, time, groups, generator=random) if decays else None
    if g is not None:
        g[:, 40] = -1e4  # all before is forgotten, and the digits of what follows are not lost
    state = torch.randn(2, groups, F, K, generator=random)
    want, after = linear_attention_reference(q, k, v, g, state)
    cuts = (0, 1, 32, 33, 65, 66, 150)
    for edges in ((0, 150), cuts):
        found, held = [], state
        for start, end in pairwise(edges):
            feeds = {n: x[:, start:end].flatten(2) for n, x in (("q", q), ("k", k), ("v", v))}
            feeds |= {"s": held} | ({} if g is None else {"g": g[:, start:end]})
            out, held = run(model, feeds)
            found.append(out)
        torch.testing.assert_close(torch.cat(found, 1), want.flatten(2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(held, after, rtol=1e-4, atol=1e-4)


def test_other_rules_stay_the_operators():
    for model in (alone(2, 2, "gated", str(2 * F)), alone(2, 2, "gated_delta")):
        assert not decays_by_head(model)
        assert linear_products(model) == 0
        assert choose_operators(model, "products") == ("", "")


@pytest.mark.parametrize(
    ("times", "asked", "written", "told"),
    [
        ((6.0, 1.25), "auto", "products", ": 1.2 ms for 512 steps on this machine, 6 ms by onnxruntime's operator"),
        ((0.4, 1.2), "auto", "fused", ""),
        ((1.0, 0.9), "auto", "fused", ""),  # not worth what a step loses
        ((0.4, 1.2), "products", "products", "linear attention as products"),
        ((6.0, 1.2), "fused", "fused", ""),
    ],
)
def test_a_file_has_what_is_faster_here_unless_it_is_told(times, asked, written, told, monkeypatch):
    monkeypatch.setattr(choosing, "timed", lambda heads, groups: times)
    model = alone(2, 1)
    found, note = choose_operators(model, asked)
    assert found == written
    assert note.endswith(told)
    assert bool(note) == bool(told)
    assert decays_by_head(model) == (written == "fused")


def test_both_are_timed_on_this_machine():
    assert all(0 < ms < 1000 for ms in choosing.timed(1, 1))


@pytest.mark.parametrize("window", [0, 4])
def test_a_file_of_products_gives_torchs_numbers_and_says_what_it_has(window: int, tmp_path: Path) -> None:
    guide = captured.llama(layers=1)
    module = exported.hybrid(guide, thesean.Target("linear-attention", window=window))
    report = export(module, guide.signature, tmp_path / "m.onnx", train_length=30, operators="products")
    assert report.stateful
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert report.operators == "products"
    assert report.note == "linear attention as products"
    assert "linear attention as products" in describe_file(report.path)[0]


def test_words_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    guide = captured.mlp()
    for asked, told in (
        ({"operators": "avx2"}, "operators: expected one of auto, fused, products, found 'avx2'"),
        ({"operators": "products", "runtime": "portable"}, "runtime='portable' has products alone"),
    ):
        with pytest.raises(ExportError, match=told):
            export(guide.graph_module, guide.signature, tmp_path / "m.onnx", **asked)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="operators is for ONNX files alone"):
        export(guide.graph_module, guide.signature, tmp_path / "m.pt2", operators="products")
