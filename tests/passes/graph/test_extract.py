"""A stretch cut out computes what the network computes there, at other sizes than it was traced with.

B batch, T time
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tests import captured
from thesean.errors import PassRefused
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.extract import _constants, extract
from thesean.passes.graph.record import record
from thesean.passes.plan.make_plan import make_plan

GUIDES = {
    "gpt2": ("gru", ["bool[batch, 1, time, time]"]),
    "llama": ("gru", ["bool[batch, 1, time, time]", "float32[1, 1, time, 8]", "float32[1, 1, time, 8]"]),
    "token_mixer": ("gru", []),
    "resnet": ("mlp", []),
    "tied": ("mlp", []),
}


def last_part(guide: Captured, target: str):
    return make_plan(guide, target).parts[-1].region


@pytest.mark.parametrize("name", GUIDES)
def test_a_part_cut_out_gives_the_networks_own_numbers(name: str):
    guide: Captured = getattr(captured, name)()
    region = last_part(guide, GUIDES[name][0])
    sizes = {s: 3 if s.startswith("batch") else 9 for s in guide.signature.symbols}
    values = record(guide.graph_module, guide.signature.random_inputs(sizes))
    cut = extract(guide.graph_module, region.entry, region.exit)
    inputs = cut.inputs(guide.signature, sizes)
    assert inputs["hidden"].shape == values[region.entry].shape
    (found,) = cut.graph_module(**inputs | {"hidden": values[region.entry]})
    assert torch.equal(found, values[region.exit])


@pytest.mark.parametrize("name", GUIDES)
def test_masks_and_position_tables_come_in_and_weights_do_not(name: str):
    guide: Captured = getattr(captured, name)()
    region = last_part(guide, GUIDES[name][0])
    cut = extract(guide.graph_module, region.entry, region.exit)
    sides = [spec.describe().split(": ")[1] for spec in cut.signature.inputs[1:]]
    assert sides == GUIDES[name][1]
    called = {n.target for n in cut.graph_module.graph.nodes if n.op == "get_attr"}
    assert called <= set(dict(guide.graph_module.named_parameters(remove_duplicate=False))) | set(
        dict(guide.graph_module.named_buffers())
    )


def test_what_does_not_follow_from_the_entry_is_refused():
    guide = captured.mlp()
    region = last_part(guide, "mlp")
    with pytest.raises(PassRefused, match="is not computed from"):
        extract(guide.graph_module, region.exit, region.entry)


def test_what_is_made_of_weights_alone_is_constant_and_what_is_made_of_an_input_is_not():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    turned = graph.call_function(torch.ops.aten.t.default, (weight,))
    twice = graph.call_function(torch.ops.aten.mul.Tensor, (turned, 2))
    graph.output(graph.call_function(torch.ops.aten.mm.default, (x, twice)))
    assert _constants(graph) == {weight, turned, twice}
