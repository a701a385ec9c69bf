"""What a batch carries beside the guide's inputs, and a forward(**kwargs) took without reading it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from thesean.passes.capture.captured import Captured
from thesean.passes.capture.inputs import own_parameters, unwrapped


def without_unread(captured: Captured, model: nn.Module) -> Captured:
    """Without inputs that forward doesn't name and the graph doesn't read, as long as one is left; in place."""
    named = own_parameters(unwrapped(model))
    graph = captured.graph_module.graph
    unread = [n for n in graph.find_nodes(op="placeholder") if not n.users and str(n.target) not in named]
    if not unread or len(unread) == len(captured.signature.inputs):
        return captured
    gone = {str(node.target) for node in unread}
    for node in unread:
        graph.erase_node(node)
    captured.graph_module.recompile()
    signature = replace(
        captured.signature, inputs=tuple(spec for spec in captured.signature.inputs if spec.name not in gone)
    )
    example = {name: value for name, value in captured.example.items() if name not in gone}
    notes = tuple(note for note in captured.notes if note.partition(":")[0] not in gone)
    return replace(captured, signature=signature, example=example, notes=notes)
