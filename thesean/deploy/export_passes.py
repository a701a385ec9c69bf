"""What an export runs on a graph, in order."""

from __future__ import annotations

import torch

from thesean.passes.base import Attempt, Pass
from thesean.passes.cache_attention import CacheAttention
from thesean.passes.cache_latents import CacheLatents
from thesean.passes.cache_steps import CacheSteps
from thesean.passes.carry_cells import CarryCells
from thesean.passes.carry_sums import CarrySums
from thesean.passes.cells_as_modules import CellsAsModules
from thesean.passes.delay_steps import DelaySteps
from thesean.passes.flatten_outputs import FlattenOutputs
from thesean.passes.folds_as_modules import FoldsAsModules
from thesean.passes.graph.signature import Signature
from thesean.passes.inline_modules import InlineModules
from thesean.passes.memories_as_modules import MemoriesAsModules
from thesean.passes.slices_of_joins import SlicesOfJoins
from thesean.passes.thread_state import ThreadState
from thesean.passes.write_out_attention import WriteOutAttention
from thesean.passes.write_out_for_onnx import WriteOutForOnnx


def remembering(signature: Signature, ahead: bool = False) -> tuple[Pass, ...]:
    """What gives each kind of part that is left a state for ThreadState: causal ones, and those that look `ahead`."""
    return (
        CacheLatents(signature),
        InlineModules(signature, ahead),
        CacheAttention(signature),
        CacheSteps(signature, ahead),
        CarrySums(signature),
        CarryCells(signature),
        MemoriesAsModules(),
    )


def streaming(signature: Signature, ahead: bool = False) -> tuple[Pass, ...]:
    """What makes a stream of a network whose parts read what they are made of, as SlicesOfJoins leaves them."""
    return (*remembering(signature, ahead), DelaySteps(signature), ThreadState(signature))


def for_export(
    signature: Signature,
    probes: tuple[dict[str, torch.Tensor], ...],
    stateful: bool | None = None,
    trusted: frozenset[str] = frozenset(),
) -> tuple[Pass | Attempt, ...]:
    """What export runs on a frozen copy. `stateful`: True must, None may, False does not carry a state; kept
    convolutions that look ahead become late where it must, or where a converted part is.

    BoundPositions is not among them: a conversion ends with it, so that module and file are bounded alike.
    """
    with_state = streaming(signature, ahead=stateful is True)
    threading: dict[bool | None, tuple[Pass | Attempt, ...]] = {True: with_state, None: (Attempt(*with_state),)}
    return (
        SlicesOfJoins(),
        *threading.get(stateful, ()),
        WriteOutAttention(probes, trusted),
        WriteOutForOnnx(),
        FoldsAsModules(),
        MemoriesAsModules(),
        FlattenOutputs(),
        CellsAsModules(),
    )
