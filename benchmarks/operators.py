"""How fast is each kind of operator really, a floating-point operation of one beside that of another?

A plan weighs FLOPs by these figures (thesean/passes/analyse/speed.py), for a depthwise convolution with half of the
FLOPs of a dense one takes longer. One row a kind and shape: a few of the operator side by side, as a file of their own,
on one thread in onnxruntime. `g_per_s` is billions of FLOPs a second, of elements where an operator has no FLOPs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite import Case, Result, Run, turns
from thesean.deploy.session import Session

SEVERAL = 4  # of one operator, so that a call's own cost is shared
# kind, shape in words -> (operator, shape of the input, shape of the weight, attributes)
CASES: dict[str, tuple[str, list[int], list[int], dict[str, Any]]] = {
    "matmul, 128 x 256 by 256 x 256": ("MatMul", [1, 128, 256], [256, 256], {}),
    "matmul, 64 x 64 by 64 x 64": ("MatMul", [1, 64, 64], [64, 64], {}),
    "convolution, 3 x 3, 64 channels, 28 x 28": ("Conv", [1, 64, 28, 28], [64, 64, 3, 3], {"pads": [1] * 4}),
    "convolution, 3 x 3, 32 channels, 16 x 16": ("Conv", [1, 32, 16, 16], [32, 32, 3, 3], {"pads": [1] * 4}),
    "convolution, 1 x 1, 256 channels, 14 x 14": ("Conv", [1, 256, 14, 14], [256, 256, 1, 1], {}),
    "depthwise, 3 x 3, 256 channels, 28 x 28": ("Conv", [1, 256, 28, 28], [256, 1, 3, 3], {"pads": [1] * 4}),
    "depthwise, 5 x 5, 256 channels, 28 x 28": ("Conv", [1, 256, 28, 28], [256, 1, 5, 5], {"pads": [2] * 4}),
    "depthwise, 5 x 5, 128 channels, 16 x 16": ("Conv", [1, 128, 16, 16], [128, 1, 5, 5], {"pads": [2] * 4}),
    "grouped, 5 x 5, 64 to 256 channels, 28 x 28": ("Conv", [1, 64, 28, 28], [256, 1, 5, 5], {"pads": [2] * 4}),
    "grouped, 3 x 3, 32 to 128 channels, 16 x 16": ("Conv", [1, 32, 16, 16], [128, 1, 3, 3], {"pads": [1] * 4}),
    "grouped, 3 x 3, 8 groups of 8, 28 x 28": ("Conv", [1, 64, 28, 28], [64, 8, 3, 3], {"pads": [1] * 4}),
    "elementwise, add, 256 x 28 x 28": ("Add", [1, 256, 28, 28], [256, 28, 28], {}),
    "elementwise, sigmoid, 256 x 28 x 28": ("Sigmoid", [1, 256, 28, 28], [], {}),
    "recurrence, gru, 128 steps, 256 units": ("GRU", [128, 1, 256], [1, 768, 256], {"hidden_size": 256}),
}


def work(operator: str, into: list[int], weight: list[int]) -> int:
    """FLOPs of one, elements where there are none. All keep the map's size."""
    if operator == "GRU":
        return 2 * into[0] * 2 * int(np.prod(weight))
    if operator == "Conv":
        return 2 * int(np.prod(into[2:])) * int(np.prod(weight))
    return 2 * int(np.prod(into)) * weight[1] if operator == "MatMul" else int(np.prod(into))


def write(path: Path, operator: str, into: list[int], weight: list[int], attributes: dict[str, Any]) -> None:
    """A file of SEVERAL of the operator side by side."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    scale = 1 / max(1, int(np.prod(weight[1:]))) ** 0.5
    if operator == "Conv":
        attributes = attributes | {"group": into[1] // weight[1]}
    nodes, constants, outputs = [], [], []
    for k in range(SEVERAL):
        reads = ["x"]
        for which in ("w", "r") if operator == "GRU" else ("w",) if weight else ():
            value = (random.standard_normal(weight) * scale).astype(np.float32)
            constants.append(numpy_helper.from_array(value, f"{which}{k}"))
            reads.append(f"{which}{k}")
        nodes.append(helper.make_node(operator, reads, [f"y{k}"], **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, None))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, into)
    graph = helper.make_graph(nodes, "operators", [x], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def run(run: Run) -> None:
    wanted = [name for name in CASES if run.wants(name)]
    with tempfile.TemporaryDirectory() as folder:
        calls, done = {}, {}
        for at, name in enumerate(wanted):
            operator, into, weight, attributes = CASES[name]
            path = Path(folder) / f"{at}.onnx"
            write(path, operator, into, weight, attributes)
            session, feeds = Session(path), {"x": np.zeros(into, np.float32) + 0.5}
            calls[name] = lambda session=session, feeds=feeds: session.run(feeds)
            done[name] = SEVERAL * work(operator, into, weight)
        for name, figures in turns(calls, run.settings["rounds"]).items():
            run.add(name, None, **figures, g_per_s=round(done[name] / figures["median_ms"] / 1e6, 2))


def table(result: Result) -> str:
    rows = [f"| {row['name']} | {row['median_ms']} | {row['g_per_s']} |" for row in result["cases"]]
    return "\n".join(["| operator | ms | billions a second |", "|---|---|---|", *rows])


CASE = Case(
    question="How fast is each kind of operator, by the FLOP?",
    minutes=0.2,
    unit="ms",
    run=run,
    settings={"rounds": 200},
    quick={"rounds": 2},
    needs=("onnx", "onnxruntime"),
    table=table,
)
