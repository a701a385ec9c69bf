"""The guide itself as a file: what a conversion has to beat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from torch import nn

from thesean.distill.task import InputsOf
from thesean.keywords import check_keywords
from thesean.origin import with_origin
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import bound_positions
from thesean.request import Request
from thesean.samples import samples_of

if TYPE_CHECKING:
    from thesean.deploy.export_report import ExportReport, GuideForm


def export_guide(
    model: nn.Module,
    path: str | Path,
    *,
    data: Iterable[Any] | None = None,
    inputs: InputsOf | None = None,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    stateful: Literal["auto", "yes", "no"] | bool = "auto",
    **asked: Unpack[GuideForm],
) -> ExportReport:
    """Write `model` as it is to an ONNX file that onnxruntime was seen to run with torch's numbers.

    A causal language model gets its keys and values as state, so that one file serves prefill, chunks and single steps:
    the fair rival of a conversion's. It is what `compile(...).frontier[0].export(path)` writes, without a conversion;
    positions past a table read its last row there. The arguments are those of `compile` and `Converted.export`,
    `opset`, `tolerance`, `dtype`, `external_data`, `check`, `quantize`, `runtime` and `operators` among them.

    Raises CaptureError, DataError, ExportError (no file is left then), MissingExtraError, and UnknownNameError for an
    argument that there is not.
    """
    from thesean.deploy.encoder_decoder import export_network
    from thesean.deploy.export_report import Form, GuideForm
    from thesean.deploy.quantizing.quantized import check_form

    check_keywords(export_guide, GuideForm, asked)
    form = Form(**asked)  # type: ignore[typeddict-item]  # more may be put in
    if form.get("quantize") is not None:
        check_form(form.get("quantize"), form.get("dtype"))
    request = Request(data=data, inputs=inputs, example_inputs=example_inputs, dynamic=dynamic)
    captured = with_origin(capture(model, request.example(model), request.dynamic))
    bound_positions(captured.graph_module)
    if form.get("quantize") is not None:
        form["samples"] = samples_of(data, captured.signature, inputs=inputs)
    return export_network(
        captured.graph_module,
        captured.signature,
        path,
        stateful=stateful,
        **form,
        train_length=captured.signature.example_sizes.get("time"),
    )
