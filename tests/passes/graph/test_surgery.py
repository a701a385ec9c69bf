from __future__ import annotations

import torch

from tests import captured, models
from tests.models import vectors
from thesean.passes.graph.surgery import clone, unshare


def places(module: torch.nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*module.parameters(), *module.buffers())}


def test_a_clone_has_parameters_of_its_own_and_a_sharing_one_the_same():
    guide = captured.resnet().graph_module
    assert places(clone(guide)).isdisjoint(places(guide))
    assert places(clone(guide, share=True)) == places(guide)
    assert clone(guide, share=True).graph is not guide.graph


def test_what_was_shared_is_copied_and_tied_parameters_stay_tied():
    guide = captured.tied().graph_module
    shared = clone(guide, share=True)
    unshare(shared, guide)
    assert places(shared).isdisjoint(places(guide))
    assert len(places(shared)) == len(places(guide))
    assert models.same_state(shared, models.state_of(guide))
    x = vectors(2, 8)
    assert torch.equal(shared(x), guide(x))
    reads = {n.target: n.meta["val"] for n in shared.graph.find_nodes(op="get_attr")}
    assert all(value is shared.get_parameter(str(name)) for name, value in reads.items())


def test_what_is_not_shared_stays_where_it_is():
    guide = captured.mlp().graph_module
    own = clone(guide)
    before = places(own)
    unshare(own, guide)
    assert places(own) == before


def test_frozen_parameters_stay_frozen():
    guide = clone(captured.mlp().graph_module)
    first = next(iter(guide.parameters()))
    first.requires_grad_(False)
    shared = clone(guide, share=True)
    unshare(shared, guide)
    assert [p.requires_grad for p in shared.parameters()] == [p.requires_grad for p in guide.parameters()]
