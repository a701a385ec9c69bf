"""Which guides convert? Each is converted, run at other sizes, saved, loaded where its code is not, and exported.

"right": all that was checked holds. "refused": one line of ours says why; where it is that the conversion is worse than
nothing, what comes with the error is checked all the same. "wrong": numbers that don't hold, or an error that isn't
ours. Rows of a batch must not see each other, nor the past the future where the guide's doesn't, and a padded row is
what it is alone where it is so in the guide.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import thesean
from benchmarks.suite import ROOT, Case, Result, Run
from benchmarks.zoo import LENGTH, Inputs, Specimen, specimens
from thesean.errors import LostError, TheseanError

# Of the output's largest value: fp32 sums in another order are 1e-6 apart, half precision's 1e-2.
_BOUND = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 1e-1, torch.float16: 2e-2}

_LOADER = """
import sys, torch, thesean
torch.set_num_threads(1)
for folder in map(str.strip, sys.stdin):
    inputs, wanted = torch.load(folder + "/check.pt", weights_only=True)
    try:
        with torch.no_grad():
            found = thesean.load(folder + "/saved")(**inputs)
        leaves = [v for v in torch.utils._pytree.tree_leaves(found) if isinstance(v, torch.Tensor)]
        same = all(torch.equal(a, b) for a, b in zip(leaves, wanted, strict=True))
        print("same" if same else "other numbers", flush=True)
    except Exception as error:
        print(type(error).__name__ + ": " + str(error).splitlines()[0], flush=True)
"""


class Loader:
    """One process that holds nothing of any guide's code, and loads a folder after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _LOADER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def says(self, folder: Path) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() or "the process has ended"

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()


class Wrong(Exception):
    """What was checked doesn't hold."""


def bench(run: Run) -> None:
    with Loader() as loader:
        for specimen in specimens():
            for target in specimen.targets[: run.settings["targets"]]:
                name = f"{specimen.name} -> {target}"
                if run.wants(name):
                    verdict, why = judge(specimen, target, loader)
                    run.add(name, None, verdict=verdict, why=why)
                    print(f"    {verdict}  {why}", flush=True)
                    if verdict == "wrong":
                        run.fault(f"{name}: {why}")


def judge(specimen: Specimen, target: str, loader: Loader) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "right", check(specimen, target, Path(folder), loader)
        except TheseanError as error:
            return "refused", _line(error)
        except Wrong as error:
            return "wrong", _line(error)
        except Exception as error:  # whatever else it is, it isn't ours
            where = traceback.extract_tb(error.__traceback__)[-1]
            return "wrong", f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {_line(error)}"


def check(specimen: Specimen, target: str, folder: Path, loader: Loader) -> str:
    """Raises Wrong, or what conversion raises; the result tells what an export refused."""
    guide = specimen.model()
    before = copy.deepcopy(guide.state_dict())
    batches = [specimen.inputs(4, LENGTH, seed) for seed in range(3)]
    given: dict[str, Any] = {"data": batches[1:], "eval_data": batches[:1], "recipe": "fast", "progress": False}
    lost: LostError | None = None
    try:
        converted = thesean.compile(guide, target, **given)
    except LostError as error:  # these weights are random: what it is worth is one thing, whether it runs another
        lost, converted = error, error.converted
    for key, value in guide.state_dict().items():
        _hold(torch.equal(value, before[key]), f"the guide's {key} was changed")
    bound = _BOUND[next((p.dtype for p in guide.parameters()), torch.float32)]
    _other_sizes(specimen, guide, converted, bound)
    _rows_alone(specimen, guide, converted, bound)
    _causality(specimen, guide, converted, bound)
    _elsewhere(specimen, converted, folder, loader)
    without_file = ""
    try:
        converted.export(folder / "m.onnx")
    except TheseanError as error:
        without_file = f"no file: {_line(error).replace(f'{folder}/', '')}"
    if lost is not None:
        raise lost
    return without_file


def _other_sizes(specimen: Specimen, guide: Any, converted: Any, bound: float) -> None:
    inputs = specimen.inputs(2, LENGTH + 5 if specimen.lengths else LENGTH, 7)
    theirs, own = leaves(guide, inputs), leaves(converted, inputs)
    _hold([v.shape for v in own] == [v.shape for v in theirs], "other shapes than the guide's at another size")
    _hold(all(bool(v.isfinite().all()) for v, g in zip(own, theirs, strict=True) if g.isfinite().all()), "not finite")


def _rows_alone(specimen: Specimen, guide: Any, converted: Any, bound: float) -> None:
    """The last row, without what is padded behind it, where the guide's own agrees."""
    inputs = specimen.inputs(3, LENGTH, 8)
    length = int(inputs["attention_mask"][-1].sum()) if "attention_mask" in inputs else LENGTH
    cut = {k: v[-1:, :length] if v.ndim == 2 and v.shape[1] == LENGTH else v[-1:] for k, v in inputs.items()}
    for whole, alone, which in ((guide, guide, "guide"), (converted, converted, "conversion")):
        pairs = zip(leaves(whole, inputs), leaves(alone, cut), strict=True)
        agrees = all(_near(_row(a, b), b, bound) for a, b in pairs)
        if which == "guide" and not agrees:
            return
        _hold(agrees, "a row of a batch is not what it is alone")


def _row(whole: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """The last row of a batch, as far as the row alone goes."""
    if whole.ndim != alone.ndim or whole.ndim == 0 or whole.shape[0] != 3:
        return alone
    row = whole[-1:]
    return row[tuple(slice(0, n) for n in alone.shape)]


def _causality(specimen: Specimen, guide: Any, converted: Any, bound: float) -> None:
    inputs = specimen.inputs(2, LENGTH, 9)
    moved = {
        k: torch.cat([v[:, :-1], v[:, -1:].flip(0)], 1) if v.ndim > 1 and v.shape[1] == LENGTH else v
        for k, v in inputs.items()
    }
    if not specimen.lengths or "decoder_input_ids" in inputs:
        return

    def keeps(model: Any) -> bool:
        first, second = leaves(model, inputs)[0], leaves(model, moved)[0]
        return first.ndim == 3 and first.shape[1] == LENGTH and _near(first[:, :-1], second[:, :-1], bound)

    if keeps(guide):
        _hold(keeps(converted), "a step reads later ones, where the guide's doesn't")


def _elsewhere(specimen: Specimen, converted: Any, folder: Path, loader: Loader) -> None:
    """Saved, and loaded by a process that holds nothing of the guide's code."""
    converted.save(folder / "saved")
    inputs = specimen.inputs(2, LENGTH, 10)
    torch.save((taken(converted, inputs), leaves(converted, inputs)), folder / "check.pt")
    said = loader.says(folder)
    _hold(said == "same", f"loaded elsewhere: {said}")


def leaves(model: Any, inputs: Inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = _plain(model(**taken(model, inputs)))
    return [v for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor)]


def taken(model: Any, inputs: Inputs) -> Inputs:
    """What a guide takes and never reads, a conversion doesn't take."""
    if not isinstance(model, thesean.Converted):
        return inputs
    return {spec.name: inputs[spec.name] for spec in model.signature.inputs}


def _plain(output: Any) -> Any:
    """Hugging Face's outputs as dictionaries, without the caches that a conversion leaves out."""
    items = getattr(output, "items", None)
    if items is None:
        return output
    return {k: _plain(v) for k, v in items() if k not in ("past_key_values", "cache_params", "state")}


def _near(a: torch.Tensor, b: torch.Tensor, bound: float) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point() or not a.numel():
        return True
    scale = max(1.0, float(b[b.isfinite()].abs().max())) if bool(b.isfinite().any()) else 1.0
    return bool(torch.allclose(a, b, rtol=0, atol=bound * scale, equal_nan=True))


def _hold(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def table(result: Result) -> str:
    cases = result["cases"]
    counts = Counter(c["verdict"] for c in cases)
    lines = [
        f"{len({c['name'].split(' -> ')[0] for c in cases})} guides, {len(cases)} conversions: "
        + ", ".join(f"{counts[v]} {v}" for v in ("right", "refused", "wrong"))
        + f"; {sum(c['verdict'] == 'right' and not c['why'] for c in cases)} exported and checked in onnxruntime.",
        "",
        "| conversion | | why |",
        "|---|---|---|",
    ]
    for case in cases:
        if case["verdict"] != "right" or case["why"]:
            why = case["why"].replace("|", "\\|")
            lines.append(f"| {case['name']} | {case['verdict']} | {why} |")
    return "\n".join(lines)


CASE = Case(
    question="Which guides convert, which are refused, and why?",
    minutes=60,
    unit="verdict",
    run=bench,
    settings={"targets": 2},
    quick={"targets": 1},
    quick_only=("policy and value -> mlp",),
    needs=("transformers", "onnxruntime"),
    table=table,
)
