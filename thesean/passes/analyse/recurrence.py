"""What a region's own recurrent cells are: an LSTM, a GRU or an Elman network that the guide came with.

E hidden units of a direction, G gates, M rows, I inputs
"""

from __future__ import annotations

from operator import getitem
from typing import Any, Literal

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import Values, between, probe_rows, read_affine, run_rows
from thesean.passes.analyse.dataflow import SIZE_ONLY
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.nodes import argument, leaf_nodes
from thesean.passes.graph.opaque_cells import CELLS
from thesean.targets.shared.facts import Affine, CellFacts, CellWeights

aten = torch.ops.aten

_KINDS: dict[str, Literal["lstm", "gru", "elman"]] = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "elman"}

# Of the output's largest value
_EXACT = 1e-4

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def recurrent_units(region: Region) -> int | None:
    """The hidden units, per direction, of the widest recurrent cell in a region; None without one."""
    return max((_units(n) for n in region.nodes if n.target in CELLS), default=None)


def _units(cell: fx.Node) -> int:
    """From the first matrix, (G E, width of the input): a projected LSTM puts out fewer than it holds."""
    first = argument(cell, 2, "params")[0]
    return int(first.meta["val"].shape[0]) // _GATES[CELLS[cell.target]]


@torch.no_grad()
def find_cell(region: Region, values: dict[fx.Node, Any]) -> CellFacts | None:
    """The region's one recurrent cell, where it reads what an affine map makes of each step, and an affine map of its
    hidden states is all that the region gives; None for any other. What was read reproduces the recorded output.
    """
    cells = [n for n in region.nodes if n.target in CELLS]
    if len(cells) != 1 or (kind := _KINDS.get(CELLS[cells[0].target])) is None:
        return None
    (cell,) = cells
    read = cell.args[0]
    hidden = [n for n in cell.users if n.target is getitem and n.args[1] == 0]
    if len(hidden) != 1 or len(hidden) != len(cell.users) or not isinstance(read, fx.Node):
        return None
    if not all(starts_anew(n) and not values[n].any() for n in leaf_nodes(cell.args[1])):
        return None
    weights = _weights(cell, values)
    before = _affine(region, values, region.entry, read)
    after = _affine(region, values, hidden[0], region.exit)
    if weights is None or before is None or after is None:
        return None
    dtype = region.entry.meta["val"].dtype
    if read is not region.entry:
        weights = tuple(_reading(each, before) for each in weights)
    output = None if hidden[0] is region.exit else after.to(dtype)
    stored = tuple(CellWeights(*(w.to(dtype) for w in each)) for each in weights)
    facts = CellFacts(kind=kind, weights=stored, output=output)
    x, y = values[region.entry], values[region.exit]
    got = facts.read_by(y.shape[-1]).of(facts.hidden(x))
    return facts if got.shape == y.shape and (got - y).abs().max() <= _EXACT * y.abs().max() else None


def starts_anew(node: fx.Node) -> bool:
    """Whether no more than the sizes of an input flow into a state."""
    if node.op == "placeholder":
        return False
    if node.target is aten.sym_size.int or node.target in SIZE_ONLY:
        return True
    return all(map(starts_anew, node.all_input_nodes))


def _weights(cell: fx.Node, values: Values) -> tuple[CellWeights, ...] | None:
    """None for a projected one, whose weights don't come in pairs, and for weights that are computed."""
    params, has_biases = argument(cell, 2, "params"), bool(argument(cell, 3, "has_biases"))
    directions = 2 if argument(cell, 7, "bidirectional") else 1
    if any(p.op != "get_attr" for p in params) or len(params) != directions * (4 if has_biases else 2):
        return None
    tensors = [values[p] for p in params]
    size = len(params) // directions
    found = []
    for first in range(0, len(params), size):
        own = tensors[first : first + size]
        zero = own[0].new_zeros(len(own[0]))
        found.append(CellWeights(*own, *(() if has_biases else (zero, zero))))
    return tuple(found)


def _affine(region: Region, values: Values, source: fx.Node, wanted: fx.Node) -> Affine | None:
    """What maps one node to another, step by step; of a node to itself one that nobody reads."""
    if source is wanted:
        return Affine(torch.zeros(0, 0), torch.zeros(0))
    x, nodes = values[source], between(region, [source], wanted)
    if not isinstance(values[wanted], torch.Tensor) or x.shape[:-1] != values[wanted].shape[:-1]:
        return None
    x_MI = probe_rows(x)
    probed = run_rows(nodes, values, {source: x_MI})
    return None if wanted not in probed else read_affine(nodes, values, source, wanted, x_MI, probed[wanted])


def _reading(weights: CellWeights, before: Affine) -> CellWeights:
    """The cell of what the map before it reads."""
    own = weights.input_GEI
    bias = weights.input_bias_GE + own @ before.bias_O.to(own)
    return weights._replace(input_GEI=own @ before.weight_OI.to(own), input_bias_GE=bias)
