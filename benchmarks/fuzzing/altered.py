"""Real folders, altered: values, nodes, operators, names, shapes, bytes; checksums are repaired, as by an attacker."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.suite import ROOT
from thesean.passes.graph.operators import operators

FOLDERS = ROOT / "tests" / "formats" / "v1" / "conversions"
FILES = ("weights.safetensors", "plan.yaml", "report.json", "example.safetensors")

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**62, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e-300, 1e308, "",
    "x", "self", "lambda", "batch", "time", "float32", "int64", "bool", "a.b", "__class__", [], {}, [[]], [1],
    {"node": "x"}, {"device": "cuda"}, {"dtype": "float16"}, {"float": "nan"}, {"tuple": []}, {"slice": [0, 1, 2]},
    "shelve.DbfilenameShelf", "os.system", "aten.as_strided.default", "transformers.modeling_outputs.BaseModelOutput",
]  # fmt: skip
_TEXTS = ["&a [*a]", "!!python/name:os.system x", "[" * 50, "\x00", "- ", ": ", "1e999", "2001-01-01", "\t", "{}"]


@cache
def sources() -> list[Path]:
    return sorted(p for p in FOLDERS.iterdir() if p.is_dir())


class Altered:
    """The folder of a chain of numbers: the first says which one and what is altered in it, each other what then."""

    def __init__(self, chain: tuple[int, ...]) -> None:
        self.chain = chain
        self.random = random.Random(chain[0])
        self.source = self.random.choice(sources())

    def write(self, folder: Path) -> None:
        shutil.copytree(self.source, folder)
        document = json.loads((folder / "graph.json").read_text("utf-8"))
        self._add_example(folder, document)
        self._alter(folder, document)
        for number in self.chain[1:]:
            self.random = random.Random(number)
            self._alter(folder, document)
        if isinstance(document.get("files_sha256"), dict):
            for name in document["files_sha256"]:
                if isinstance(name, str) and "/" not in name and "\0" not in name and (folder / name).is_file():
                    document["files_sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        document.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        (folder / "graph.json").write_text(json.dumps({"sha256": digest, **document}), encoding="utf-8")

    def _alter(self, folder: Path, document: dict[str, Any]) -> None:
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
                (1, lambda: self._alter_names(folder)),
            ]
            try:
                self.random.choices([k for _, k in kinds], [w for w, _ in kinds])[0]()
            except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError):
                continue  # of what an earlier change left nothing to alter in

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
                holder[key] = copy.deepcopy(other["name"])  # a tree, whatever an earlier change made of a name
            case 1:
                self.random.shuffle(node["args"])
            case 2:
                node["args"].append(copy.deepcopy(self.random.choice(_VALUES)))
            case 3:
                nodes.remove(node)
            case _:
                node["target"] = copy.deepcopy(other["target"])

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
        new = f"new_{len(nodes) - 1}"
        nodes[-1]["value"] = {"tuple": [nodes[-1]["value"], {"node": new}]}

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

    def _alter_names(self, folder: Path) -> None:
        """A file takes another one's name, or that of the weights in a folder of transformers."""
        name, other = self.random.choice(FILES), self.random.choice((*FILES, "model.safetensors"))
        (folder / name).replace(folder / other)
        if self.random.random() < 0.5:
            shutil.copy(folder / other, folder / name)

    def _alter_header(self, path: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        self._alter_value(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
