"""Does a saved folder stay data, whatever stands in it? Real ones are altered at random, and loaded.

Each run takes a folder that some version wrote, changes it in one to four places (values, nodes, operators, names,
shapes, bytes), repairs the checksums as an attacker would, and loads it. A run is "refused" (ArtifactError), "loaded"
and then called at two sizes, or "late": it loads, and torch refuses the call, as a value out of a table's range does.
Faults are "foreign" (another error out of load) and "died": a signal, no answer in time, or more memory than is given.
Runs are numbered: the same number is the same folder. `python -m benchmarks fuzz --seeds 3` runs other numbers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import thesean
from benchmarks.suite import ROOT, Case, Result, Run
from thesean.errors import ArtifactError, TheseanError
from thesean.passes.graph.operators import operators

FOLDERS = ROOT / "tests" / "formats" / "v1" / "conversions"
FILES = ("weights.safetensors", "plan.yaml", "report.json", "example.safetensors")
_AT_ONCE = 200  # runs of one process
_SECONDS, _BYTES = 20, 12 * 2**30  # that a run may take, and a process's address space

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**62, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e-300, 1e308, "",
    "x", "self", "lambda", "batch", "time", "float32", "int64", "bool", "a.b", "__class__", [], {}, [[]], [1],
    {"node": "x"}, {"device": "cuda"}, {"dtype": "float16"}, {"float": "nan"}, {"tuple": []}, {"slice": [0, 1, 2]},
    "shelve.DbfilenameShelf", "os.system", "aten.as_strided.default", "transformers.modeling_outputs.BaseModelOutput",
]  # fmt: skip
_TEXTS = ["&a [*a]", "!!python/name:os.system x", "[" * 50, "\x00", "- ", ": ", "1e999", "2001-01-01", "\t", "{}"]

# What was found once: a run of each must be refused, or be harmless, for ever. (folder, number of the run)
FOUND: tuple[int, ...] = ()


class Altered:
    """Run number `number`: which folder, and what is altered in it."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.source = self.random.choice(sorted(p for p in FOLDERS.iterdir() if p.is_dir()))

    def write(self, folder: Path) -> None:
        shutil.copytree(self.source, folder)
        document = json.loads((folder / "graph.json").read_text("utf-8"))
        self._add_example(folder, document)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            kinds: list[tuple[int, Callable[[], None]]] = [
                (5, lambda: self._alter_value(document)),
                (3, lambda: self._alter_node(document["nodes"])),
                (2, lambda: self._alter_operator(document["nodes"])),
                (1, lambda: self._alter_signature(document)),
                (1, lambda: self._alter_json(folder / "report.json")),
                (1, lambda: self._alter_text(folder / "plan.yaml")),
                (1, lambda: self._alter_bytes(folder / self.random.choice(FILES))),
                (1, lambda: self._alter_header(folder / self.random.choice((FILES[0], FILES[3])))),
            ]
            try:
                self.random.choices([k for _, k in kinds], [w for w, _ in kinds])[0]()
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                continue  # of what an earlier change left nothing to alter in
        if isinstance(document.get("files_sha256"), dict):
            digests = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in FILES}
            document["files_sha256"] |= {k: v for k, v in digests.items() if k in document["files_sha256"]}
        document.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        (folder / "graph.json").write_text(json.dumps({"sha256": digest, **document}), encoding="utf-8")

    def _add_example(self, folder: Path, document: dict[str, Any]) -> None:
        """Version 0.1.0 wrote none."""
        rows = document["signature"]["inputs"]
        shapes = {r["name"]: [4 if isinstance(d, str) else d for d in r["shape"]] for r in rows}
        save_file(
            {r["name"]: torch.ones(shapes[r["name"]], dtype=getattr(torch, r["dtype"])) for r in rows},
            folder / "example.safetensors",
        )
        document["files_sha256"]["example.safetensors"] = ""

    def _places(self, value: Any) -> list[tuple[Any, Any]]:
        """Every (holder, key) of a tree."""
        keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        found = [(value, key) for key in keys]
        return found + [place for key in keys for place in self._places(value[key])]

    def _alter_value(self, document: Any) -> None:
        places = self._places(document)
        holder, key = self.random.choice(places)
        match self.random.randrange(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = copy.deepcopy(self.random.choice(_VALUES))
            case 2:
                other, at = self.random.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 3 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 4 if isinstance(holder, dict) and isinstance(key, str):
                holder[self.random.choice([v for v in _VALUES if isinstance(v, str)])] = holder.pop(key)
            case _ if isinstance(holder[key], int):
                holder[key] += self.random.choice((-1, 1, 7, 10**6))
            case _:
                holder[key] = [holder[key]]

    def _alter_node(self, nodes: list[dict[str, Any]]) -> None:
        node, other = self.random.choice(nodes), self.random.choice(nodes)
        references = [(h, k) for h, k in self._places(node) if k == "node"]
        match self.random.randrange(5):
            case 0 if references:  # reads another node
                holder, key = self.random.choice(references)
                holder[key] = other["name"]
            case 1:
                self.random.shuffle(node["args"])
            case 2:
                node["args"].append(copy.deepcopy(self.random.choice(_VALUES)))
            case 3:
                nodes.remove(node)
            case _:
                node["target"] = other["target"]

    def _alter_operator(self, nodes: list[dict[str, Any]]) -> None:
        calls = [n for n in nodes if n["op"] == "call_function"]
        node = self.random.choice(calls)
        if self.random.random() < 0.5:
            node["target"] = self.random.choice(sorted(operators()))
            return
        name = self.random.choice(sorted(operators()))  # one more, of what is there
        before = nodes[: self.random.randrange(1, len(nodes))]
        args = [
            {"node": self.random.choice(before)["name"]} if self.random.random() < 0.6 else self.random.choice(_VALUES)
            for _ in range(self.random.randrange(4))
        ]
        nodes.insert(
            len(before),
            {"name": f"new_{len(nodes)}", "op": "call_function", "target": name, "args": copy.deepcopy(args)},
        )
        nodes[-1]["value"] = {"tuple": [nodes[-1]["value"], {"node": nodes[len(before)]["name"]}]}

    def _alter_signature(self, document: dict[str, Any]) -> None:
        self._alter_value(document["signature"])

    def _alter_json(self, path: Path) -> None:
        document = json.loads(path.read_text("utf-8"))
        self._alter_value(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    def _alter_text(self, path: Path) -> None:
        lines = path.read_text("utf-8").splitlines()
        at = self.random.randrange(len(lines))
        lines[at] = lines[at][: self.random.randrange(len(lines[at]) + 1)] + self.random.choice(_TEXTS)
        path.write_text("\n".join(lines), encoding="utf-8")

    def _alter_bytes(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = self.random.randrange(len(data))
        if self.random.random() < 0.3:
            del data[at:]
        else:
            data[at] ^= 1 << self.random.randrange(8)
        path.write_bytes(bytes(data))

    def _alter_header(self, path: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        self._alter_value(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def outcome(number: int) -> str:
    """What comes of one altered folder: "refused", "loaded", "late: ..." or "foreign: ..."."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "saved"
        Altered(number).write(folder)
        try:
            loaded = thesean.load(folder)
        except ArtifactError:
            return "refused"
        except Exception as error:
            return f"foreign: {type(error).__name__}: {str(error)[:200]}"
        for more in (0, 1):
            sizes = {s: n + more for s, n in loaded.signature.example_sizes.items()}
            try:
                with torch.no_grad():
                    loaded(**loaded.signature.random_inputs(sizes))
            except TheseanError:
                continue
            except Exception as error:
                return f"late: {type(error).__name__}: {str(error)[:200]}"
        return "loaded"


def outcomes(first: int, count: int, until: float = float("inf")) -> dict[int, str]:
    """Of runs `first` to `first + count`, in processes of their own, as far as they come by then (time.monotonic)."""
    found: dict[int, str] = {}
    at = first
    while at < first + count and time.monotonic() < until:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(range(at, min(at + _AT_ONCE, first + count)), writer, until)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as lines:
            begun = at
            for line in lines:
                row = json.loads(line)
                begun = row["number"]
                if "outcome" in row:
                    found[begun] = row["outcome"]
        _, status = os.waitpid(child, 0)
        if status and begun not in found:
            found[begun] = f"died: signal {status & 127}, status {status >> 8}"
        at = begun + 1
    return found


def _work(numbers: range, writer: int, until: float) -> None:
    """In the child: tells each run before it begins, and what came of it."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    try:
        for number in numbers:
            if time.monotonic() > until:
                break
            os.write(writer, (json.dumps({"number": number}) + "\n").encode())
            signal.alarm(_SECONDS)  # whose default is to end the process
            os.write(writer, (json.dumps({"number": number, "outcome": outcome(number)}) + "\n").encode())
            signal.alarm(0)
        os._exit(0)
    finally:
        os._exit(1)


def bench(run: Run) -> None:
    for seed in run.seeds:
        for block in range(run.settings["blocks"]):
            name = f"runs {seed}.{block}"
            if not run.wants(name, seed):
                continue
            first = (seed * 1_000_000) + block * run.settings["runs"]
            found = outcomes(first, run.settings["runs"])
            counts = Counter(text.partition(":")[0] for text in found.values())
            bad = {str(n): text for n, text in found.items() if text.startswith(("foreign", "died"))}
            run.add(name, seed, **counts, faults=bad)
            print(f"    {dict(counts)}", flush=True)
            for number, text in bad.items():
                run.fault(f"run {number}: {text}")


def table(result: Result) -> str:
    kinds = ("refused", "loaded", "late", "foreign", "died")
    total = {k: sum(c.get(k, 0) for c in result["cases"]) for k in kinds}
    lines = ["| " + " | ".join(kinds) + " |", "|" + "---:|" * len(kinds)]
    return "\n".join([*lines, "| " + " | ".join(f"{total[k]:,}" for k in kinds) + " |"])


CASE = Case(
    question="Does a saved folder stay data, whatever stands in it?",
    minutes=15,
    unit="runs",
    run=bench,
    settings={"blocks": 20, "runs": 1000},
    quick={"blocks": 1, "runs": 40},
    table=table,
)
