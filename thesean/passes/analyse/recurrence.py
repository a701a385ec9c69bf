"""What a region's own recurrent cells are: an LSTM, a GRU or an Elman network that the guide came with.

E hidden units of a direction, G gates
"""

from __future__ import annotations

from torch import fx

from thesean.passes.analyse.regions import Region
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.opaque_cells import CELLS

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def recurrent_units(region: Region) -> int | None:
    """The hidden units, per direction, of the widest recurrent cell in a region; None without one."""
    return max((_units(n) for n in region.nodes if n.target in CELLS), default=None)


def _units(cell: fx.Node) -> int:
    """From the first matrix, (G E, width of the input): a projected LSTM puts out fewer than it holds."""
    first = argument(cell, 2, "params")[0]
    return int(first.meta["val"].shape[0]) // _GATES[CELLS[cell.target]]
