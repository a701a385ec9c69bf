"""Quality against latency: the guide, every hybrid of a frontier and other conversions, served side by side."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from torch import nn

from thesean.converted import Converted, Frontier, is_saved, load
from thesean.distill.callbacks import checked_reader
from thesean.distill.data import Reading
from thesean.distill.outputs import OutputKind
from thesean.distill.task import InputsOf, LabelsOf, Loss, Metric
from thesean.errors import DataError, ExportError
from thesean.judged import Asked, Judged
from thesean.keywords import check_keywords
from thesean.passes.graph.modes import usual_settings
from thesean.passes.graph.signature import Signature
from thesean.report.environment import environment
from thesean.report.points import Cost, Served, TradeOff
from thesean.report.trade_offs import TradeOffs
from thesean.scratch import named
from thesean.with_guide import with_guide

if TYPE_CHECKING:
    from thesean.deploy.export_report import ExportReport
    from thesean.deploy.quantizing.tools import Quantize
    from thesean.deploy.timing.costs import FileCosts

logger = logging.getLogger(__name__)

Network = Converted | Frontier | str | Path


class Judging(TypedDict, total=False):
    """What networks are judged by on data; each as in `compile`."""

    loss: Loss | None
    metric: Metric | None
    inputs: InputsOf | None
    labels: LabelsOf | None
    outputs: Mapping[str, OutputKind] | None


def trade_offs(
    networks: Network | Mapping[str, Network],
    *,
    guide: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    lengths: Sequence[int] = (64, 512, 2048),
    batches: Sequence[int] = (1, 8),
    quantize: Sequence[Quantize | None] = (None, "int8"),
    repeats: int = 20,
    **judging: Unpack[Judging],
) -> TradeOffs:
    """What each network loses and what it costs in onnxruntime, on one thread, and which of them no other one beats.

    networks: what `compile` returned, whose whole frontier is measured, the guide with its cache among it; a saved
    conversion's folder or a run's `workdir`, which needs `guide`; or several by name, of one guide: a conversion, or a
    folder, is one point then, and a `converted.frontier` all of its own.
    data: held-out batches on which all are judged: divergence from the guide, and `loss(output, batch)` and
    `metric(output, batch)`, with labels that fit, or of the next token of a language model, where neither is given.
    Without data the figures are those of the conversion's own report. loss, metric, inputs, labels, outputs: by
    name, as in `compile`.
    lengths, batches: the tokens of a prefill, and after which one more is timed, and rows; without a time dimension
    there is one forward. quantize: forms of each file as in `export`, None for the exact one; others are judged as they
    run in onnxruntime, and so need data. repeats: turns of each latency, fewer where they take long.

    What can't be exported is left out, and `notes` say why. Files take turns, so that load hits all alike; memory is
    that of a process for each. Raises DataError, ArtifactError, CaptureError, MissingExtraError, and ExportError where
    no file is left.
    """
    from thesean.deploy.loaded import require

    check_keywords(trade_offs, Judging, judging)
    require("onnx", "onnxruntime", "onnxscript")
    _check_sizes(lengths=lengths, batches=batches, repeats=(repeats,))
    forms = _checked_forms(quantize)
    with usual_settings(), tempfile.TemporaryDirectory() as folder:
        members = _members(networks, guide, data, judging.get("inputs"))
        if data is None and isinstance(networks, Mapping) and len(networks) > 1:
            raise DataError("data: networks of several runs are judged on the same batches; give held-out ones.")
        files = _Files(Path(folder), forms, data, judging.get("inputs"))
        first = members[0].made()
        written = files.write(members[0], first)
        judged = None
        if data is not None:
            task = Asked(
                loss=judging.get("loss"),
                metric=judging.get("metric"),
                outputs=judging.get("outputs"),
                decodes=any(f.report.stateful for f in written),
            )
            readers = checked_reader("inputs", judging.get("inputs")), checked_reader("labels", judging.get("labels"))
            judged = Judged(first.module, first.signature, data, Reading(*readers), task)
        _judge(written, first, judged)
        for member in members[1:]:
            network = member.made()
            _check_alike(first.signature, network.signature, member.name)
            more = files.write(member, network)
            _judge(more, network, judged)
            written += more
        if not written:
            raise ExportError(f"no network could be exported: {'; '.join(files.notes)}")
        points = tuple(_points(written, first.signature, lengths, batches, repeats))
    return TradeOffs(
        points=points,
        unit=judged.unit if judged is not None else "nats for logits, else shares of the variance",
        judged=judged.told if judged is not None else "judged as in the conversion's report, on its held-out data",
        notes=(*files.notes, *_not_run(points)),
        environment=environment(),
    )


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A network by name, made when it is asked for: hybrids weigh as much as the guide, each."""

    name: str
    kind: Literal["guide", "hybrid", "converted"]
    made: Callable[[], Converted]


def _members(
    networks: Network | Mapping[str, Network],
    guide: nn.Module | None,
    data: Iterable[Any] | None,
    inputs: InputsOf | None,
) -> list[_Member]:
    """The guide first, each network once. Raises DataError where there is no guide to set them against."""
    several = networks if isinstance(networks, Mapping) else {"": networks}
    if not several:
        raise DataError("networks: expected at least one, found none.")
    found = {name: _read(network) for name, network in several.items()}
    beside = next((f for f in map(_frontier, found.values()) if len(f)), None)
    if beside is None and guide is not None:
        first = next(n for n in found.values() if isinstance(n, Converted))
        beside = with_guide(first, guide, data=data, inputs=inputs).frontier
    if beside is None:
        name = next((str(n) for n in several.values() if isinstance(n, (str, Path))), "what was loaded")
        raise DataError(
            f"{name}: a saved conversion holds neither its guide nor hybrids, and one point is no trade-off. Give the "
            "guide too, or what `compile` returned."
        )
    guide_of: Frontier = beside
    members = [_Member(name="guide", kind="guide", made=lambda: guide_of[0])]
    for name, network in found.items():
        if name == "guide":
            raise DataError("networks: 'guide' is the guide's own name; choose another for the conversion.")
        if name and isinstance(network, Converted):
            members.append(_Member(name=name, kind="converted", made=lambda n=network: n))  # type: ignore[misc]
            continue
        hybrids = _frontier(network) if len(_frontier(network)) else guide_of
        members += _hybrids(name, hybrids)
    return members


def _hybrids(name: str, frontier: Frontier) -> Iterator[_Member]:
    """All but the guide."""
    last = len(frontier) - 1
    for k in range(1, last):
        told = f"{k} of {last}"
        yield _Member(name=f"{name}, {told}" if name else told, kind="hybrid", made=lambda k=k: frontier[k])  # type: ignore[misc]
    yield _Member(name=name or "converted", kind="converted", made=lambda: frontier[last])


def _read(network: Network) -> Converted | Frontier:
    if isinstance(network, (Converted, Frontier)):
        return network
    folder = named(network, "read", DataError)
    inside = folder / "converted"  # of a run's folder
    return load(inside if not (folder / "graph.json").is_file() and is_saved(folder) else folder)


def _frontier(network: Converted | Frontier) -> Frontier:
    return network.frontier if isinstance(network, Converted) else network


@dataclass(kw_only=True)
class _File:
    member: _Member
    form: Quantize | None
    report: ExportReport
    replaced: int
    of: int
    params: int
    quality: Mapping[str, float | None]

    @property
    def name(self) -> str:
        return self.member.name if self.form is None else f"{self.member.name}, {self.form}"


class _Files:
    """Networks as files, which go with the folder, and why others are not among them."""

    def __init__(
        self, folder: Path, forms: Sequence[Quantize | None], data: Iterable[Any] | None, inputs: InputsOf | None
    ) -> None:
        self.folder, self.forms, self.data, self.inputs = folder, forms, data, inputs
        self.notes: list[str] = []
        self._numbers = itertools.count()
        if data is None and any(forms):
            self.notes.append("exact files alone: without data= nothing tells what others lose")
            self.forms = (None,)

    def write(self, member: _Member, network: Converted) -> list[_File]:
        written: list[_File] = []
        for form in self.forms:
            logger.info("exporting %s%s", member.name, f", {form}" if form else "")
            path = self.folder / f"{next(self._numbers)}.onnx"
            try:
                report = network.export(path, quantize=form, data=self.data if form else None, inputs=self.inputs)
            except ExportError as error:
                told = str(error).replace(f"{path}: ", "")  # a file that the caller never named
                self.notes.append(f"{member.name}{f', {form}' if form else ''} is left out: {told}")
                if form is None:
                    break
                continue
            written.append(
                _File(
                    member=member,
                    form=form,
                    report=report,
                    replaced=len(network.plan.replaced),
                    of=len(network.plan),
                    params=network.report.params,
                    quality=network.report.converted,
                )
            )
        return written


def _judge(files: Sequence[_File], network: Converted, judged: Judged | None) -> None:
    """An exact file by its network, with which it was compared when it was written; others as they run."""
    from thesean.deploy.session import Session

    for file in files if judged is not None else ():
        assert judged is not None
        file.quality = asdict(
            judged.module(network.module) if not file.form else judged.file(Session(file.report.path))
        )


def _points(
    files: Sequence[_File], signature: Signature, lengths: Sequence[int], batches: Sequence[int], repeats: int
) -> Iterator[TradeOff]:
    from thesean.deploy.timing.costs import costs_of_files

    paths = {file.name: file.report.path for file in files}
    costs, kinds = costs_of_files(paths, signature, lengths, batches, repeats)
    for file in files:
        kind = kinds[file.name]
        yield TradeOff(
            name=file.name,
            kind=file.member.kind,
            form=file.form or "float32",
            replaced=file.replaced,
            of=file.of,
            **{name: file.quality.get(name) for name in ("divergence", "loss", "metric")},
            params=file.params,
            file_bytes=file.report.bytes + (file.report.encoder.bytes if file.report.encoder else 0),
            token_kind=kind,  # type: ignore[arg-type]  # one of its words
            served=tuple(_served(cost) for cost in costs[file.name]),
        )


def _not_run(points: Sequence[TradeOff]) -> Iterator[str]:
    missing: dict[tuple[int, int | None], list[str]] = {}
    for point in points:
        for served in point.served:
            if served.prefill is None:
                missing.setdefault((served.batch, served.length), []).append(point.name)
    for (batch, length), names in missing.items():
        where = f"batch {batch}" if length is None else f"{length} tokens, batch {batch}"
        yield f"no figure at {where} for {', '.join(names)}: not within sizes, or memory that is free"


def _served(costs: FileCosts) -> Served:
    held = costs.footprint
    return Served(
        batch=costs.batch,
        length=costs.length,
        prefill=None if costs.prefill is None else Cost(**asdict(costs.prefill)),
        token=None if costs.token is None else Cost(**asdict(costs.token)),
        state_bytes=None if held is None else held.state_bytes,
        peak_memory_mib=None if held is None else held.peak_mib,
    )


def _check_alike(one: Signature, other: Signature, name: str) -> None:
    here, there = ([i.describe() for i in s.inputs] for s in (one, other))
    if here != there:
        raise DataError(
            f"{name}: takes {', '.join(there)}; the guide takes {', '.join(here)}. Networks of one guide are compared."
        )


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, numbers in sizes.items():
        whole = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers)
        if not whole or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise DataError(f"{name}: expected whole numbers of 1 or more, found {numbers!r}.")


def _checked_forms(forms: Any) -> tuple[Quantize | None, ...]:
    from thesean.deploy.quantizing.quantized import check_form

    if isinstance(forms, str) or not isinstance(forms, Sequence) or not forms:
        raise DataError(f"quantize: expected a list such as [None, 'int8'], found {forms!r}.")
    for form in forms:
        if form is not None:
            check_form(form, None)
    return (None, *(form for form in dict.fromkeys(forms) if form is not None))
