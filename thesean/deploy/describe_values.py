"""What a file's inputs and outputs say of themselves, for whoever opens it in a viewer.

B batch, T time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thesean.passes.graph.halves import ENCODED
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.thread_state import PAST, STATE_IN, STATE_OUT

if TYPE_CHECKING:
    import onnx_ir as ir


def describe_values(model: ir.Model, signature: Signature, delay: int = 0) -> None:
    """Doc strings on all of them. Outputs are `delay` steps late."""
    specs = {spec.name: spec for spec in signature.inputs}
    for value in model.graph.inputs:
        name = str(value.name)
        if name.startswith(STATE_IN):
            grows = any(str(d).startswith(PAST) for d in _dims(value))
            start = f"nothing ({PAST} of 0)" if grows else "zeros"
            value.doc_string = (
                f"state; starts as {start}, then {STATE_OUT}{name.removeprefix(STATE_IN)} of the last call"
            )
        elif name in specs:
            value.doc_string = _input(specs[name])
        else:
            value.doc_string = "true where a token comes in; false brings out what is late"
    for value in model.graph.outputs:
        name = str(value.name)
        if name.startswith(STATE_OUT):
            value.doc_string = f"state; the next call's {STATE_IN}{name.removeprefix(STATE_OUT)}"
        elif name.lstrip("_").startswith(ENCODED):
            value.doc_string = "made of the source; the decoder's input of that name, in every call"
        else:
            value.doc_string = f"the guide's output, {delay} steps late" if delay else "the guide's output"


def _input(spec: InputSpec) -> str:
    if spec.held:
        return "the encoder's output of that name, the same in every call"
    if spec.high is not None:
        return f"ids from 0 to {spec.high - 1}"
    return "mask of the steps that hold a token" if spec.mask else "the guide's input"


def _dims(value: ir.Value) -> list[object]:
    return [getattr(d, "value", d) for d in value.shape or ()]
