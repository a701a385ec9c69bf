"""Two models, layer by layer, over batches."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import thesean
from tests import models
from thesean.errors import DataError, NumericalError, UnknownNameError
from thesean.module_outputs import select_modules
from thesean.similarity import accumulate, similarity
from thesean.targets import Target


class Blocks(nn.Module):
    """A stack of blocks on vectors or sequences; `offset` moves every layer's features away from 0."""

    def __init__(self, width: int, depth: int, offset: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.drop = nn.Dropout(0.5)
        self.act = nn.Tanh()
        with torch.no_grad():
            self.embed.bias.add_(offset)

    def forward(self, x, attention_mask=None):
        x = self.drop(self.embed(x))
        for block in self.blocks:
            x = x + self.act(block(x))
        return {"hidden": x}


def batches(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 6, generator=g) for n in sizes]


def test_the_matrix_holds_the_debiased_cka_of_each_pair_of_layers():
    a, b, data = Blocks(10, 3), Blocks(14, 2, seed=1), batches(40, 30)
    found = thesean.compare(a, b, data)
    assert found.layers_a == ("blocks.0", "blocks.1", "blocks.2")
    assert found.layers_b == ("blocks.0", "blocks.1")
    assert (found.measure, found.examples) == ("cka-debiased", 70)
    running = accumulate("cka-debiased")
    with torch.no_grad():
        for x in data:
            features = []
            for model, depth in ((a.eval(), 2), (b.eval(), 1)):
                h = model.embed(x)
                for block in list(model.blocks)[:depth]:
                    h = h + block(h).tanh()
                features.append(model.blocks[depth](h))
            running.update(*features)
    assert found.matrix[2, 1].item() == pytest.approx(running.compute().item(), abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_an_offset_of_the_features_costs_no_digits(offset):
    a, b, data = Blocks(10, 2, offset), Blocks(14, 2, offset, seed=1), batches(200)
    found = thesean.compare(a, b, data, layers_a="embed", layers_b="embed").matrix
    with torch.no_grad():
        exact = similarity(a.embed(data[0]).double(), b.embed(data[0]).double(), "cka-debiased")
    assert found.item() == pytest.approx(exact.item(), abs=1e-5)


def test_a_model_is_itself_and_stays_as_it_was():
    model = Blocks(10, 2).train()
    model.drop.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = thesean.compare(
        model, model, batches(32), layers_a=["embed", "blocks.*.0"], layers_b=["embed", "blocks.*.0"]
    )
    assert found.layers_a == ("embed", "blocks.0.0", "blocks.1.0")
    assert torch.allclose(found.matrix.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.matrix, found.matrix.mT)
    assert model.training
    assert model.embed.training
    assert not model.drop.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_runs_twice_is_two_layers():
    found = thesean.compare(Blocks(10, 2), Blocks(10, 2), batches(32), layers_a="act", layers_b="blocks.1")
    assert found.layers_a == ("act", "act#2")


def test_what_makes_a_weight_is_no_layer():
    """A weight norm is a module in a list, and gives a weight: it has no rows of examples."""
    model = Blocks(10, 2)
    nn.utils.parametrizations.weight_norm(model.embed)
    for layers in (None, ["embed", "embed.**"]):
        found = thesean.compare(model, model, batches(32), layers_a=layers, layers_b=layers)
        assert not any("parametrizations" in name for name in found.layers_a)
        assert found.layers_a[0] == ("blocks.0" if layers is None else "embed")


def test_a_batch_of_many_rows_is_cut_into_grams_that_fit():
    a, b, data = Blocks(10, 1), Blocks(14, 1, seed=1), batches(700)
    whole = similarity(
        a.eval().blocks[0](a.embed(data[0])).double(), b.eval().blocks[0](b.embed(data[0])).double(), "cka-debiased"
    )
    found = thesean.compare(a, b, data)
    assert found.examples == 700
    assert found.matrix.item() == pytest.approx(whole.item(), abs=0.02)


@pytest.mark.parametrize("measure", ["mse", "rsa"])
def test_other_measures_are_averaged_over_batches_by_rows(measure):
    a, b, data = Blocks(10, 2), Blocks(10, 1, seed=1), batches(40, 20)
    found = thesean.compare(a, b, data, measure)
    assert found.estimator == "mean over batches"
    features = [[model.eval().blocks[0](model.embed(x)).detach() for model in (a, b)] for x in data]
    values = [similarity(x, y, measure).item() for x, y in features]
    assert found.matrix.shape == (2, 1)
    assert found.matrix[0, 0].item() == pytest.approx((40 * values[0] + 20 * values[1]) / 60, rel=1e-6)


def test_tokens_that_the_attention_mask_hides_are_left_out():
    a, b = Blocks(10, 1), Blocks(14, 1, seed=1)
    x_BTD, mask_BT = torch.randn(6, 9, 6, generator=torch.Generator().manual_seed(0)), torch.ones(6, 9).long()
    mask_BT[:, 5:] = 0
    padded_BTD = x_BTD.clone()
    padded_BTD[:, 5:] = 1e6
    expected = thesean.compare(a, b, [x_BTD[:, :5]], flatten="token")
    found = thesean.compare(a, b, [{"x": padded_BTD, "attention_mask": mask_BT, "labels": None}], flatten="token")
    assert found.examples == expected.examples == 30
    assert found.matrix.item() == pytest.approx(expected.matrix.item(), abs=1e-6)


def test_batches_may_be_tuples_and_small_ones_are_counted_as_skipped():
    a, data = Blocks(10, 1), [(x, torch.zeros(len(x))) for x in batches(32, 3)]
    found = thesean.compare(a, Blocks(10, 1, seed=1), data)
    assert (found.examples, found.skipped) == (32, 3)
    with pytest.raises(DataError, match=r"no batch has enough examples, 3 in all. Use larger batches"):
        thesean.compare(a, a, data[1:])


def test_layers_are_chosen_by_glob_and_a_glob_without_a_match_says_what_there_is():
    model = Blocks(10, 2)
    assert select_modules(model, None, "layers_a") == ["blocks.0", "blocks.1"]
    assert select_modules(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), None, "layers_a") == ["0", "2"]
    assert select_modules(model, "blocks.*", "layers_a") == ["blocks.0", "blocks.1"]
    assert select_modules(model, ("**.0.1", "embed"), "layers_a") == ["embed", "blocks.0.1"]
    assert len(select_modules(model, "**", "layers_a")) == 10
    with pytest.raises(UnknownNameError, match=r"layers_b: no module of Blocks matches 'h.\*'. It has: embed, blocks,"):
        thesean.compare(model, model, batches(8), layers_b="h.*")
    with pytest.raises(DataError, match="layers_a: Tanh has no modules with weights"):
        thesean.compare(nn.Tanh(), model, batches(8))


def test_what_does_not_fit_names_the_batch_and_the_layer():
    a = Blocks(10, 1)
    with pytest.raises(DataError, match="data is empty"):
        thesean.compare(a, a, [])
    with pytest.raises(DataError, match=r"batch 0: expected a tensor, a tuple or a dict, found str"):
        thesean.compare(a, a, ["text"])
    with pytest.raises(DataError, match="batch 0: Blocks takes none of: pixel_values"):
        thesean.compare(a, a, [{"pixel_values": torch.ones(8, 6)}])
    bad = batches(8, 8)
    bad[1][0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"batch 1: blocks.0: its output holds NaN"):
        thesean.compare(a, a, bad)
    with pytest.raises(DataError, match="batch 0: blocks: the model's forward never called it"):
        thesean.compare(a, a, batches(8), layers_a="blocks")
    sequences, flat = [torch.randn(4, 5, 6)], nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    with pytest.raises(DataError, match=r"batch 0: 0 has 4 rows where blocks.0 has 20. Rows must be the same examples"):
        thesean.compare(a, flat, sequences, layers_b="0", flatten="token")
    with pytest.raises(DataError, match=r"blocks.0 and blocks.0: mse: expected x and y of the same width"):
        thesean.compare(a, Blocks(14, 1), batches(8), "mse")


MEMORY = """
import torch, thesean
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
def peak_kib():  # not ru_maxrss, which starts at the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
models = [nn.Sequential(*(nn.Linear(w, w) for _ in range(6))) for w in (256, 384)]
class Data:
    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        for _ in range(40):
            yield torch.randn(500, 256, generator=g)
models[1][0] = nn.Linear(256, 384)
before = peak_kib()
found = thesean.compare(*models, Data())
assert found.examples == 20000 and found.matrix.shape == (6, 6)
print((peak_kib() - before) / 1024)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twenty_thousand_examples_stay_under_a_gibibyte():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=150)
    assert 0 < float(run.stdout) < 1024


def test_a_converted_networks_parts_are_compared_with_the_modules_that_they_replaced():
    guide = torch.nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)))
    data = batches(64, 64)
    converted = thesean.compile(guide, "mlp", data=data, recipe="fast", progress=False)
    found = thesean.compare(guide, converted, data, layers_a=["0", "1"])
    assert (found.name_a, found.name_b) == ("Sequential", "converted")
    assert found.layers_b[:2] == ("0 (mlp)", "1 (mlp)")
    # solved in closed form on the same inputs: each part is most like what it replaced
    assert found.matrix[0].argmax() == 0
    assert found.matrix[0, 0] > 0.9
    with pytest.raises(
        UnknownNameError, match=r"no module of the converted network .* It has: 0 = part_0, 0.first = p"
    ):
        thesean.compare(guide, converted, data, layers_b="blocks.0")
    for glob in ("part_*", "?"):
        assert torch.equal(
            thesean.compare(guide, converted, data, layers_a=["0", "1"], layers_b=glob).matrix, found.matrix
        )
    below = thesean.compare(converted, converted, data, layers_a="1.last", layers_b="part_1.last")
    assert below.layers_a == below.layers_b == ("1.last (mlp)",)


def test_parts_go_by_the_guides_paths():
    guide, data = models.gpt2(3), models.token_batches(2, batch=8)
    target: dict[str, str | Target] = {
        "transformer.h.0": "rnn",
        "transformer.h.1": Target("mingru", scope="part"),
        "transformer.h.2": "keep",
    }
    converted = thesean.compile(guide, target, data=data, recipe="fast", progress=False)
    found = thesean.compare(guide, converted, data, layers_a="transformer.h.*.attn", layers_b="transformer.h.*.attn")
    assert found.layers_a == ("transformer.h.0.attn", "transformer.h.1.attn", "transformer.h.2.attn")
    assert found.layers_b == ("transformer.h.0.attn (linear-attention)",)
    both = ("transformer.h.0.attn (linear-attention)", "transformer.h.1 (mingru)")
    assert thesean.compare(guide, converted, data).layers_b == both
    assert thesean.compare(guide, converted, data, layers_b="transformer.h.*").layers_b == both  # the parts' own paths
    assert thesean.compare(converted.frontier[1], converted, data).layers_a == both[:1]
    for layers in (None, "transformer.h.*"):
        with pytest.raises(DataError, match=r"^layers_a: nothing of this network was replaced, .* the guide itself\.$"):
            thesean.compare(converted.frontier[0], converted, data, layers_a=layers)


@pytest.mark.thorough
def test_both_modules_of_a_merged_part_go_by_its_path():
    guide, data = models.gpt2(2), models.token_batches(2, batch=8)
    converted = thesean.compile(guide, "rnn", merge=2, data=data, recipe="fast", progress=False)
    found = thesean.compare(converted, converted, data, layers_b="transformer.h.0..1")
    kept, dropped = sorted(converted.plan.parts[0].replaces, key=lambda path: not path.endswith("attn"))
    assert set(found.layers_a) == set(found.layers_b) == {f"{kept} (linear-attention)", f"{dropped} (identity)"}


def test_data_without_an_end_is_compared_on_its_first_batches(monkeypatch):
    monkeypatch.setattr(sys.modules["thesean.compare"], "_MOST", 3)
    model = Blocks(8, 1).eval()
    with pytest.warns(UserWarning, match="may have no end: compared on its first 3 batches"):
        found = thesean.compare(model, model, itertools.cycle(batches(8)))
    assert found.examples == 24
    assert thesean.compare(model, model, batches(8, 8, 8, 8)).examples == 32  # a list has one
