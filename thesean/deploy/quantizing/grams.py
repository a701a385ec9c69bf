"""What products of a file are given on data: X^T X of each, without which no one could say which weights matter.

K features in
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thesean.deploy.lowering.lean.edit import Node, Value

if TYPE_CHECKING:
    import onnx_ir as ir

# bytes of what one run gives and of what is made of it; more products take more runs
_MOST = 2**29


def grams(
    source: Path, nodes: Sequence[Node], feeds: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[tuple[list[Node], torch.Tensor]]:
    """Products that are given the same, and its X^T X over all `feeds`; `nodes` are of the file, as onnx_ir has it."""
    import onnx_ir as ir
    import onnxruntime as ort

    given: dict[str, list[Node]] = {}
    for node in nodes:
        given.setdefault(str(node.inputs[0].name), []).append(node)
    rows = max(int(np.prod(value.shape[:2])) for feed in feeds for value in feed.values())
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, not printed
    seen = source.with_name("seen.onnx")
    for names in _rounds(given, rows):
        model = ir.load(source)
        _give(model, names)
        ir.save(model, seen)  # weights beside the file stay there
        session = ort.InferenceSession(seen, options, providers=["CPUExecutionProvider"])
        found: dict[str, torch.Tensor] = {}
        for feed in feeds:
            for name, value in zip(names, session.run(names, feed), strict=True):
                x_SK = torch.from_numpy(value).flatten(0, -2)
                gram_KK = x_SK.T @ x_SK
                found[name] = gram_KK if name not in found else found[name].add_(gram_KK)
        for name in names:
            yield given[name], found.pop(name)


def _rounds(given: dict[str, list[Node]], rows: int) -> Iterator[list[str]]:
    """Names that are asked for at once, at least one."""
    names: list[str] = []
    taken = 0
    for name, nodes in given.items():
        features = nodes[0].inputs[1].shape[0]
        cost = 4 * features * (features + rows)
        if names and taken + cost > _MOST:
            yield names
            names, taken = [], 0
        names.append(name)
        taken += cost
    if names:
        yield names


def _give(model: ir.Model, names: Sequence[str]) -> None:
    """These values are all that the graph gives, and computes."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    made: dict[str, Value] = {str(v.name): v for v in model.graph.inputs}
    made |= {str(v.name): v for node in model.graph for v in node.outputs}
    values: list[Any] = [made[name] for name in names]
    del model.graph.outputs[:]
    model.graph.outputs.extend(values)
    RemoveUnusedNodesPass()(model)
