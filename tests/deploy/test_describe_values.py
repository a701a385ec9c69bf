"""What a file's inputs and outputs say of themselves."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch

from thesean.deploy.describe_values import describe_values
from thesean.passes.graph.signature import InputSpec, Signature

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (int64[batch, time] ids, int64[batch, time] mask, float[batch, time] x, float[batch, steps] encoded_0,
        bool[batch, time] here, float[batch, 4] state_in_h, float[batch, 2, past, 4] state_in_key,
        float[batch, 2, past_of_4, 4] state_in_window)
    => (float[batch, time] y, float[batch, 4] state_out_h, float[batch, steps] encoded_1,
        float[batch, steps] _encoded_2)
{
    y = Identity (x)
    state_out_h = Identity (state_in_h)
    encoded_1 = Identity (encoded_0)
    _encoded_2 = Identity (encoded_0)
}
"""
STEPS = ("batch", "time")
SIGNATURE = Signature(
    inputs=(
        InputSpec(name="ids", dtype=torch.int64, shape=STEPS, high=9),
        InputSpec(name="mask", dtype=torch.int64, shape=STEPS, mask=True),
        InputSpec(name="x", dtype=torch.float32, shape=STEPS),
        InputSpec(name="encoded_0", dtype=torch.float32, shape=("batch", "steps"), held=True),
    )
)


@pytest.mark.parametrize(
    ("delay", "output"), [(0, "the guide's output"), (3, "the guide's output, 3 steps late")], ids=["at once", "late"]
)
def test_every_value_says_what_it_is_and_a_state_what_starts_it(delay, output):
    model = ir.from_proto(onnx.parser.parse_model(MODEL))
    describe_values(model, SIGNATURE, delay)
    assert {str(v.name): v.doc_string for v in model.graph.inputs} == {
        "ids": "ids from 0 to 8",
        "mask": "mask of the steps that hold a token",
        "x": "the guide's input",
        "encoded_0": "the encoder's output of that name, the same in every call",
        "here": "true where a token comes in; false brings out what is late",
        "state_in_h": "state; starts as zeros, then state_out_h of the last call",
        "state_in_key": "state; starts as nothing (past of 0), then state_out_key of the last call",
        "state_in_window": "state; starts as nothing (past of 0), then state_out_window of the last call",
    }
    assert {str(v.name): v.doc_string for v in model.graph.outputs} == {
        "y": output,
        "state_out_h": "state; the next call's state_in_h",
        "encoded_1": "made of the source; the decoder's input of that name, in every call",
        "_encoded_2": "made of the source; the decoder's input of that name, in every call",
    }
