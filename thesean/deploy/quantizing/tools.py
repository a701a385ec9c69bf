"""An exact file -> one whose weights are whole numbers of 8 or 4 bits.

By onnxruntime's own tools, but for 4 bits: the one that has data decide on how to round goes through the whole network
once for each product, and then rounds once more what it has rounded.

K features in of a product, whose weights have a scale for each output, or for each 32 features of one
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from thesean.deploy.lowering.lean.edit import MICROSOFT
from thesean.deploy.onnx_file import LIMIT, weights_bytes
from thesean.deploy.quantizing.blocks import put_in_place
from thesean.deploy.quantizing.grams import grams
from thesean.deploy.quantizing.products import Products, products, split_gemms, turn_weights
from thesean.deploy.quantizing.rounding import round_weights
from thesean.deploy.quantizing.tables import look_up_whole_numbers, round_tables
from thesean.errors import ExportError

Quantize = Literal["int8", "int8-static", "int4"]

# features of one scale, in int4. A table that is the head too has 8 bits there: by 49,152 rows of 576 a token takes
# 10.1 ms in floats, 3.3 of 8 bits and 2.2 of 4, which have ten times the error (0.0085 and 0.086 of the scale; AVX512)
_BLOCK = 32
_INT8_OF_ACTIVATIONS = 4  # onnxruntime's accuracy level: products of whole numbers, scales a row at a time

# a file's own functions make values whose type the tools don't find out
_FLOAT = {"DefaultTensorType": 1}

Feeds = Iterable[Mapping[str, np.ndarray]]


def quantize_file(source: Path, made: Path, form: Quantize, feeds: Feeds) -> Products:
    """Write `made`, beside `source`, and tell which products hold whole numbers there. `feeds`, of all that the file
    takes: what "int8-static" is calibrated on, and what "int4" rounds for; without, it takes the next number. Raises
    ExportError where there is no product of weights, or a tool fails.
    """
    import onnx_ir as ir

    model = ir.load(source)
    split_gemms(model)
    turn_weights(model)
    kinds = ("MatMul", "Conv") if form == "int8-static" else ("MatMul",)
    found = products(model, kinds)
    if not found.names:
        others = products(model, ("Conv",))
        raise ExportError(
            f"quantize={form!r}: the file multiplies nothing by a matrix of weights that could be whole numbers. "
            + ("Its convolutions are quantised by quantize='int8-static'." if others.names else "Export it as it is.")
        )
    split = made.with_name("split.onnx")
    large = weights_bytes(model) > LIMIT
    ir.save(model, split, external_data=f"{split.name}.weights" if large else None)
    with _quiet():
        try:
            rounded = _with_tables(split, found, large)
            if names := [name for name in found.names if name not in found.tables]:
                _TOOLS[form](rounded, made, names, large, feeds)
            else:  # they take none for all
                ir.save(ir.load(rounded), made, external_data=f"{made.name}.weights" if large else None)
        except Exception as error:  # the tools' own, of any class
            reason = next(iter(str(error).splitlines()), "")
            raise ExportError(
                f"quantize={form!r}: onnxruntime's tool fails: {type(error).__name__}: {reason[:300]}"
            ) from error
    return found


def _dynamic(source: Path, made: Path, names: Sequence[str], large: bool, feeds: Feeds) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        made,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=list(names),
        use_external_data_format=large,
        extra_options=dict(_FLOAT),
    )


def _static(source: Path, made: Path, names: Sequence[str], large: bool, feeds: Feeds) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self._feeds, None)

    quantize_static(
        source,
        made,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=list(names),
        use_external_data_format=large,
        # What a product gives is quantised too. Left as it is, it would be nearer to the exact file (1.3e-3 nats on the
        # demo, where this gives 2.3e-3), but onnxruntime joins it with its bias to a Gemm of floats: 3 times slower.
        extra_options={**_FLOAT, "MatMulConstBOnly": True},
    )


def _blocks(source: Path, made: Path, names: Sequence[str], large: bool, feeds: Feeds) -> None:
    import onnx_ir as ir

    model = ir.load(source)
    nodes = [node for node in model.graph if node.name in names]
    feeds = list(feeds)
    given = grams(source, nodes, feeds) if feeds else ((([node]), None) for node in nodes)
    for alike, gram_KK in given:
        for node in alike:
            weights: Any = node.inputs[1]
            weight_KN = torch.from_numpy(np.array(weights.const_value.numpy()))  # the file's own can't be written to
            put_in_place(node, round_weights(weight_KN, _BLOCK, gram_KK), _BLOCK, _INT8_OF_ACTIVATIONS)
    model.opset_imports.setdefault(MICROSOFT, 1)
    ir.save(model, made, external_data=f"{made.name}.weights" if large else None)


def _with_tables(source: Path, found: Products, large: bool) -> Path:
    """The file with 8 bits for embeddings, and for the products of those that are the head too."""
    import onnx_ir as ir

    if not found.embeddings and not found.tables:
        return source
    model = ir.load(_heads(source, found, large) if found.tables else source)
    look_up_whole_numbers(model, found.tables)
    round_tables(model)
    model.opset_imports.setdefault(MICROSOFT, 1)
    made = source.with_name("rounded.onnx")
    ir.save(model, made, external_data=f"{made.name}.weights" if large else None)
    return made


def _heads(source: Path, found: Products, large: bool) -> Path:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    tool = MatMulNBitsQuantizer(
        model,
        bits=8,
        block_size=_BLOCK,
        is_symmetric=True,
        accuracy_level=_INT8_OF_ACTIVATIONS,
        nodes_to_exclude=[n.name for n in model.graph.node if n.op_type == "MatMul" and n.name not in found.tables],
        op_types_to_quantize=("MatMul",),
    )
    tool.process()
    made = source.with_name("heads.onnx")
    tool.model.save_model_to_file(str(made), large)
    return made


_TOOLS: dict[str, Callable[[Path, Path, Sequence[str], bool, Feeds], None]] = {
    "int8": _dynamic,
    "int8-static": _static,
    "int4": _blocks,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools give advice to the root logger, tell of each node, and one that is imported sets the root logger up to
    show all that any library tells from then on.
    """
    root = logging.getLogger()
    before, level, handlers = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        root.setLevel(level)
        root.handlers[:] = handlers
