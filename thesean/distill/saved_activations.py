"""The guide's activations on batches, in a folder: written once, read by every run of the same guide on the same data.

activations.json says of which guide they are; beside it stands a file a batch, named by the hash of what the guide
read, with a tensor a node of the guide's graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx

from thesean.distill.guide_cache import key_of
from thesean.distill.stream import hash_of
from thesean.errors import ArtifactError, WriteError
from thesean.passes.graph.intermediates import intermediates
from thesean.scratch import named
from thesean.write_file import full_is_an_oserror, new_file, write_text

MANIFEST, _VERSION = "activations.json", 1


@dataclass(frozen=True, kw_only=True)
class Written:
    """What stands in a folder by now: `new` of its `batches` were not there before."""

    path: Path
    batches: int
    new: int
    nodes: int
    bytes: int


def guide_hash(guide: fx.GraphModule) -> str:
    """Of its operators and weights."""
    found = hashlib.blake2b(guide.code.encode(), digest_size=16)
    found.update(hash_of(guide.state_dict().values()).encode())
    return found.hexdigest()


@torch.no_grad()
def write_activations(
    guide: fx.GraphModule, nodes: Iterable[str], batches: Iterable[Mapping[str, torch.Tensor]], folder: Any
) -> Written:
    """The values of these nodes and of those that the output is made of, for each batch that isn't there yet. Raises
    WriteError for a folder that holds something else or another guide's.
    """
    path, own = named(folder), guide_hash(guide)
    wanted = sorted({*nodes, *(n.name for n in guide.graph.output_node().all_input_nodes)})
    before = _manifest(path) if (path / MANIFEST).exists() else None
    if before is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WriteError(f"{path}: expected a new or empty folder, or one of activations. Choose another.")
    if before is not None and before["guide"] != own:
        raise WriteError(f"{path}: these are another guide's activations. Choose another folder.")
    if before is not None and not set(wanted) <= set(before["nodes"]):
        raise WriteError(f"{path}: these are of other parts. Choose another folder.")
    held = wanted if before is None else before["nodes"]  # every file holds the same
    if before is None:  # first of all, so that what is cut short can go on
        told = {"version": _VERSION, "guide": own, "nodes": held}
        write_text(path / MANIFEST, json.dumps(told, indent=1), parents=True)
    run = intermediates(guide, held, with_output=False)
    new = 0
    for inputs in batches:
        file = path / f"{key_of(inputs)}.safetensors"
        if file.exists():
            continue
        # each by itself: a file holds no two that share memory
        values = {n: v.cpu().clone(memory_format=torch.contiguous_format) for n, v in run(**inputs).items()}
        with new_file(file, parents=True) as made, full_is_an_oserror():
            save_file(values, made)
        new += 1
    files = list(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return Written(path=path, batches=len(files), new=new, nodes=len(held), bytes=size)


class SavedActivations:
    """Raises ArtifactError for a folder that holds none, or another guide's."""

    def __init__(self, folder: Any, guide: fx.GraphModule) -> None:
        self.path = named(folder, "read", ArtifactError)
        if _manifest(self.path)["guide"] != guide_hash(guide):
            raise ArtifactError(
                f"{self.path}: these are another guide's activations, or its weights have changed. Write them anew: "
                "thesean activations."
            )
        self.output = guide.graph.output_node().args[0]
        self.ends = [node.name for node in guide.graph.output_node().all_input_nodes]
        self.device = next((p.device for p in guide.parameters()), torch.device("cpu"))

    def __call__(self, key: str, names: Sequence[str]) -> dict[str, Any] | None:
        """Values by name of a batch; None where it, or one of them, isn't there. Raises ArtifactError."""
        file = self.path / f"{key}.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt", device=str(self.device)) as held:
                known = set(held.keys())
                nodes = {*self.ends, *names} - {"output"} if "output" in names else set(names)
                if not nodes <= known:
                    return None
                values = {name: held.get_tensor(name) for name in nodes}
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: {error}. Write it anew: thesean activations.") from error
        made = fx.map_arg(self.output, lambda n: values[n.name]) if "output" in names else None
        return {name: made if name == "output" else values[name] for name in names}


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["version"] == _VERSION and isinstance(found["guide"], str) and isinstance(found["nodes"], list):
            return dict(found)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise ArtifactError(f"{folder}: expected a folder of activations, as `thesean activations` writes it.")
