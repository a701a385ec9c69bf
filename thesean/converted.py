"""A converted network: callable like the guide, trainable, saveable, exportable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import fx

from thesean import artifact, load_artifact
from thesean.distill.task import InputsOf
from thesean.errors import ArtifactError, DataError, ExportError
from thesean.keywords import check_keywords
from thesean.passes.graph.dump import dumping
from thesean.passes.graph.modes import usual_settings
from thesean.passes.graph.signature import Signature, output_wrapper
from thesean.passes.plan.plan import Plan
from thesean.replace_folder import reading
from thesean.report.benchmark import Benchmark
from thesean.report.conversion import ConversionReport
from thesean.report.environment import environment
from thesean.samples import samples_of
from thesean.scratch import named
from thesean.write_page import write_page

if TYPE_CHECKING:
    from thesean.deploy.export_report import ExportReport, FileForm


class Converted:
    """What `thesean.compile` and `thesean.load` return.

    `module` is an `fx.GraphModule`: train it further like any other. `frontier[k]` has the first k parts replaced
    as they were right after their stage (`frontier[0]` is the guide's own graph, `frontier[-1]` the final network);
    each is a Converted of its own. Empty after `thesean.load`.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        signature: Signature,
        plan: Plan,
        report: ConversionReport,
        frontier: Sequence[Callable[[], Converted]] = (),
    ) -> None:
        self.module = module
        self.signature = signature
        self.plan = plan
        self.report = report.written_by(partial(write_page, self))
        self.frontier = Frontier(frontier)
        self._wrap = output_wrapper(signature)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the guide is called, by position or by name. Raises DataError for inputs that don't fit."""
        inputs = self.signature.bind(args, kwargs)
        home = self._home
        for name, value in inputs.items():
            if home is not None and value.device != home:
                raise DataError(f"{name} is on {value.device}, the network on {home}. Move one of them.")
        try:
            return self._wrap(self.module(**inputs))
        except (IndexError, RuntimeError) as error:
            if why := self.signature.out_of_range(inputs):
                raise DataError(f"{why}.") from error
            if empty := next((name for name, value in inputs.items() if not value.numel()), None):
                shape = tuple(inputs[empty].shape)
                raise DataError(f"{empty} is empty, of shape {shape}: the network does not run on that.") from error
            length, trained = self.signature.check(inputs).get("time"), self.report.train_length
            if length is None or trained is None or length <= trained:
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(
                f"the network does not run at {length} steps ({reason}); it was converted at {trained}. A table of "
                "positions that the guide keeps ends there, or earlier by its strides: give shorter sequences."
            ) from error

    @property
    def _home(self) -> torch.device | None:
        return next((p.device for p in self.module.parameters()), None)

    def save(self, folder: str | Path) -> Path:
        """Write `graph.json`, `plan.yaml`, `report.json`, `weights.safetensors` and, in `example.safetensors`, a few of
        the inputs that the guide was captured with: an export is checked on such. An earlier conversion is replaced in
        one step, and what else is in its folder stays. Raises ArtifactError, and WriteError, which is one too.
        """
        return artifact.save(
            artifact.Artifact(graph_module=self.module, signature=self.signature, plan=self.plan, report=self.report),
            folder,
        )

    def export(
        self,
        path: str | Path,
        stateful: Literal["auto", "yes", "no"] | bool = "auto",
        opset: int | None = None,
        tolerance: float | None = None,
        *,
        data: Iterable[Any] | None = None,
        inputs: InputsOf | None = None,
        dump_graphs: str | Path | None = None,
        **asked: Unpack[FileForm],
    ) -> ExportReport:
        """Write an ONNX file that onnxruntime was seen to run with the torch module's numbers.

        "auto": with state inputs and outputs where the whole network is causal, so that one file serves prefill, chunks
        and step-by-step decoding; an attention that was kept has its keys and values as state. Files are compared to
        1e-4 of the output's scale, 3e-2 in float16, unless `tolerance` is given. `dump_graphs`: a folder for the graph
        as text after each pass of the export, numbered behind what `compile` left there. `data` and, as in `compile`,
        `inputs` are for `quantize`. Further arguments, by name:

        - `dtype`: torch.float32, the default whatever the network's own, or torch.float16.
        - `external_data`: the weights in a file of their own beside it; left out, where they don't fit in one (2 GiB).
        - `check`: "all", or "skip", which writes what can't be compared, as an output of torch's holds no finite
          number, and says so in report and file.
        - `quantize`: weights as whole numbers, by onnxruntime's tools: "int8" scales activations as they come,
          "int8-static" by what `data` showed, "int4" gives 32 weights a scale. The exact file is made and checked
          first, and the report says how far the other one is from it on held-out batches of `data` (left out: on inputs
          like the example), its latency and its bytes; errors may be 0.15, 0.2 and 0.5 of the output's scale there.
        - `runtime`: "onnxruntime"; "genai" makes `path` a folder that onnxruntime-genai loads, compared there too;
          "portable" keeps to operators of ONNX itself.
        - `operators`: linear attention by onnxruntime's own operator, "fused", which is slow in long sequences on
          processors without AVX-512, or as "products"; "auto" times both on this machine, and the report says which it
          took.
        - `tokenizer`: a folder or what has `save_pretrained`, which goes into the folder of "genai".

        The file's metadata hold the plan, the report, the states and the parity that was seen: `thesean inspect` prints
        them. Raises ExportError and WriteError, and then leaves no file; MissingExtraError, and UnknownNameError for an
        argument that there is not.
        """
        from thesean.deploy.encoder_decoder import export_network
        from thesean.deploy.export_report import FileForm, Form
        from thesean.deploy.onnx_file import PLAN, REPORT

        check_keywords(Converted.export, FileForm, asked)
        form = Form(**asked)  # type: ignore[typeddict-item]  # more may be put in
        if data is not None and form.get("quantize") is None:
            raise ExportError("data: only a quantised file is judged on it. Leave it out, or give quantize= too.")
        with dumping(dump_graphs):
            if form.get("quantize") is not None:
                form["samples"] = samples_of(data, self.signature, self._home, inputs)
            form["about"] = {PLAN: self.plan.to_yaml(), REPORT: json.dumps(self.report.to_dict())}
            return export_network(
                self.module,
                self.signature,
                path,
                stateful=stateful,
                opset=opset,
                tolerance=tolerance,
                train_length=self.report.train_length,
                **form,
            )

    def benchmark(
        self, contexts: Sequence[int] = (64, 512, 2048), batch: int = 1, repeats: int = 20, guide: bool = True
    ) -> Benchmark:
        """Latency in onnxruntime, one thread: prefill at each context and, where the network carries a state, one token
        after it. Networks without a time dimension have one figure, "forward". `print` it; as a mapping it has this
        network's medians in ms.

        guide: time the guide's own graph, `frontier[0]`, in the same turns; after `thesean.load` there is none, and the
        result says so. Raises ExportError when this network can't be exported, MissingExtraError.
        """
        from thesean.deploy.timing.latency import benchmark

        for name, numbers in {"contexts": contexts, "batch": (batch,), "repeats": (repeats,)}.items():
            is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers)
            if not is_list or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
                found_there = numbers if name == "contexts" else numbers[0]
                raise DataError(f"{name}: expected whole numbers of 1 or more, found {found_there!r}.")
        beside = self.frontier[0].module if guide and self.frontier else None
        found, note = benchmark(
            self.module, self.signature, guide=beside, contexts=contexts, batch=batch, repeats=repeats,
            train_length=self.report.train_length,
        )  # fmt: skip
        if guide and beside is None:
            note = "the guide was not timed: it is at hand only for what `compile` returned"
        spreads = {
            name: {key: None if figure is None else asdict(figure) for key, figure in model.figures().items()}
            for name, model in found.items()
        }
        return Benchmark(
            converted=spreads["converted"],
            guide=spreads.get("guide"),
            contexts=tuple(contexts) if found["converted"].prefill else (),
            batch=batch,
            token_kinds={name: model.token_kind for name, model in found.items() if model.token_kind is not None},
            environment=environment(),
            note=note,
        )

    def __repr__(self) -> str:
        replaced = ", ".join(sorted({p.target for p in self.plan.replaced}))
        return f"Converted({len(self.plan.replaced)} of {len(self.plan)} parts -> {replaced or 'none'})"


class Frontier(Sequence[Converted]):
    """Hybrids by the number of parts replaced, made when they are asked for."""

    def __init__(self, makers: Sequence[Callable[[], Converted]]) -> None:
        self._makers = tuple(makers)

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, index: int) -> Converted: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Converted]: ...
    def __getitem__(self, index: int | slice) -> Converted | Sequence[Converted]:
        if isinstance(index, slice):
            return Frontier(self._makers[index])
        return self._makers[index]()


def is_saved(folder: str | Path) -> bool:
    """Whether `load` would try: a conversion's folder, or a run's with one inside."""
    return any((Path(folder) / inside / "graph.json").is_file() for inside in ("", "converted"))


def load(folder: str | Path, max_bytes: int | None = None) -> Converted:
    """A saved conversion, without the guide and without the package that it came from.

    max_bytes: what its files, and one call of the example's sizes, may take in memory; left out, 32 times its files or
    2 GiB. Raises ArtifactError, and nothing else, for a folder that is incomplete, altered, too large, or holds what
    the loader doesn't know to be safe: SECURITY.md says what is promised.
    """
    folder = named(folder, "read", ArtifactError)
    try:
        with usual_settings():
            found = reading(folder, lambda place: load_artifact.load(place, max_bytes))
    except OSError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"can't read {folder}: {error.strerror or error}.") from error
    return Converted(found.graph_module, found.signature, found.plan, found.report)
