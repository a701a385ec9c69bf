"""What each architecture takes in onnxruntime, all in the same turns, and the largest of each kind within the bound."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import thesean
from benchmarks.rivalry import students
from benchmarks.rivalry.methods import Sizes, narrow
from benchmarks.rivalry.subjects import Batches, Subject, judge
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.deploy.timing.latency import latency_of_models
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import bind_plan

_NOISE = 1.03  # figures of one file in two runs differ by this much on a shared machine

# What sizes are chosen by. A median may lie between calls that ran through and calls that another process broke in two,
# anywhere: on a busy machine it was not even monotonous in the width, where the 20th percentile was.
_JUDGED = "p20"

Found = dict[str, dict[str, float]]


def architectures(subject: Subject, settings: Mapping[str, Any], data: Batches) -> dict[str, Any]:
    """Name -> a network or a plan; their weights don't matter."""
    blocks, made = len(subject.layout.blocks(subject.guide)), {}
    example: dict[str, Any] = {"example_inputs": subject.inputs(data[0])}
    for count in range(blocks - 1, 0, -1):
        if count >= blocks * 0.5:
            made[f"blocks {count}"] = students.copied(subject, count).model
    heads = settings["heads"]
    for width in settings["widths"]:
        made[f"pruned {width}"] = students.narrowed(subject, data[:2], heads, width).model
        made[f"narrow both {width}"] = thesean.plan(subject.guide, **narrow(subject.layout, heads, width), **example)
    for width in settings["alone"]:
        made[f"narrow {width}"] = thesean.plan(subject.guide, **narrow(subject.layout, None, width), **example)
    for count in settings["attentions"]:
        made[f"attentions {count}"] = students.silenced(subject, range(count)).model
    return made


def timed(subject: Subject, made: Mapping[str, Any], data: Batches, repeats: int) -> tuple[Found, dict[str, Any]]:
    """Milliseconds of one row of `context` tokens by name, "guide" and "int8" among them, and int8's own figures."""
    captured = capture(subject.guide, subject.inputs(data[0]))
    example = subject.inputs(data[0])
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path] = {}

        def path(name: str) -> Path:
            files[name] = Path(scratch) / f"{len(files)}.onnx"
            return files[name]

        thesean.export_guide(subject.guide, path("guide"), example_inputs=example, stateful="no")
        thesean.export_guide(
            subject.guide, path("int8"), data=[subject.inputs(b) for b in data[:4]], stateful="no", quantize="int8"
        )
        for name, network in made.items():
            if isinstance(network, thesean.Plan):
                graph_module = build_hybrid(bind_plan(captured, network)).graph_module
                BoundPositions()(graph_module)
                export(graph_module, captured.signature, path(name), stateful="no")
            else:
                thesean.export_guide(network, path(name), example_inputs=example, stateful="no")
            print(f"exported {name}", flush=True)
        found = latency_of_models(files, captured.signature, (subject.context,), 1, repeats)
        quantised = {
            domain: judge(subject, _Served(files["int8"]), batches) for domain, batches in subject.judged.items()
        }
    ms: Found = {}
    for name, figures in found.items():
        timing = figures.prefill[subject.context]
        assert timing is not None
        ms[name] = {"ms": timing.median_ms, "p20": timing.p20_ms, "p80": timing.p80_ms}
    return ms, quantised


class _Served:
    """A file, called as the guide is."""

    def __init__(self, path: Path) -> None:
        self.session = Session(path, threads=1)

    def __call__(self, **inputs: Any) -> Any:
        import torch

        made, _ = self.session.run({name: value.numpy() for name, value in inputs.items()})
        values = {name: torch.from_numpy(value) for name, value in made.items()}
        return _Output(values) if "logits" in values else next(iter(values.values()))


class _Output:
    def __init__(self, values: dict[str, Any]) -> None:
        self.logits = values["logits"]


def bound_of(subject: Subject, ms: Found) -> float:
    """The guide's time by the speed-up asked for, or that of the most blocks that come so near."""
    asked = ms["guide"][_JUDGED] / subject.speedup
    blocks = {n: v[_JUDGED] for n, v in ms.items() if n.startswith("blocks ")}
    near = [v for v in blocks.values() if v <= asked * _NOISE] or [min(blocks.values())]
    return max(asked, *near)


def sizes_within(subject: Subject, ms: Found, settings: Mapping[str, Any]) -> Sizes:
    """The largest of each kind that meets the bound, the smallest timed where none does, 0 where none was."""
    bound = bound_of(subject, ms)

    def largest(kind: str) -> int:
        counts = {int(n.rsplit(" ", 1)[1]): v[_JUDGED] for n, v in ms.items() if n.rsplit(" ", 1)[0] == kind}
        return max((c for c, v in counts.items() if v <= bound), default=min(counts, default=0))

    neurons = min(largest("pruned"), largest("narrow both"))
    return Sizes(largest("blocks"), settings["heads"], neurons, largest("narrow"), largest("attentions"))


def names_of(sizes: Sizes) -> dict[str, str]:
    """Shape -> the timed architecture of it."""
    return {
        "blocks": f"blocks {sizes.blocks}",
        "pruned": f"pruned {sizes.neurons}",
        "narrow both": f"narrow both {sizes.neurons}",
        "narrow": f"narrow {sizes.alone}",
        "attentions": f"attentions {sizes.attentions}",
        "auto": "auto",
        "int8": "int8",
    }
