"""A network in two: what an encoder makes of its source at once, and a decoder that goes step by step beside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from thesean.passes.graph.signature import Signature

# In the meta of a network that was divided: its `Halves`.
HALVES = "halves"

# The modules that it calls, and how the names of what crosses from the one to the other begin.
ENCODER, DECODER, ENCODED = "encoder", "decoder", "encoded_"

# A mark in the meta of a decoder's input that is held: its length is none of the steps that come in.
HELD = "held"


@dataclass(frozen=True, kw_only=True)
class Halves:
    """How both are called. The encoder gives what crosses, by the names of the decoder's inputs that are held, and then
    those of the network's outputs that are its own. `leaves`: of each output of the network, whether it is the
    encoder's, and which one of those that the half gives. `length` is the network's name of the decoder's "time".
    """

    encoder: Signature
    decoder: Signature
    length: str
    leaves: tuple[tuple[bool, int], ...]

    @property
    def crossing(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.decoder.inputs if spec.held)


def halves_of(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule, Halves]:
    """Encoder and decoder of a network that was divided, and how they are called."""
    encoder, decoder = (graph_module.get_submodule(name) for name in (ENCODER, DECODER))
    assert isinstance(encoder, fx.GraphModule)
    assert isinstance(decoder, fx.GraphModule)
    return encoder, decoder, graph_module.meta[HALVES]
