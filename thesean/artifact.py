"""A saved conversion: `graph.json`, `plan.yaml`, `report.json`, `weights.safetensors`, and `example.safetensors`, a few
of the inputs that the guide was captured with. No pickle, no guide needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from thesean.errors import ArtifactError
from thesean.passes.graph import graph_json
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.plan import Plan
from thesean.replace_folder import replacing
from thesean.report.conversion import ConversionReport
from thesean.scratch import file_sha256, followed, named, telling
from thesean.targets import TargetModule
from thesean.write_file import full_is_an_oserror, new_file

FORMAT = 1
GRAPH, WEIGHTS, PLAN, REPORT = "graph.json", "weights.safetensors", "plan.yaml", "report.json"
EXAMPLE = "example.safetensors"  # version 0.1.0 wrote none; whose inputs are nobody's business may delete it
MODEL, NETWORK = "model.safetensors", "network."  # of a Hugging Face folder: the weights, and how their names begin
FILE_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
}  # fmt: skip
_OURS = frozenset((GRAPH, WEIGHTS, PLAN, REPORT, EXAMPLE))


@dataclass(frozen=True, kw_only=True)
class Artifact:
    graph_module: fx.GraphModule
    signature: Signature
    plan: Plan
    report: ConversionReport


def save(artifact: Artifact, folder: str | Path, beside: Mapping[Path, str] | None = None) -> Path:
    """Write a folder; an earlier conversion in its place is replaced at the end, in one step. What else is in it stays.

    beside: texts of files that belong to it. At no moment does one stand beside a conversion that it isn't of.

    Raises ArtifactError when the folder holds something else, and for custom modules whose class could not be found
    again; WriteError when it can't be written.
    """
    folder = named(folder)
    check_free(folder)
    check_nameable(artifact.graph_module)
    with ExitStack() as files, telling(folder), full_is_an_oserror():
        for path, text in (beside or {}).items():
            files.enter_context(new_file(path)).write_text(text, encoding="utf-8")
        with replacing(folder, _OURS, _taken_away(beside or {})) as made:
            write_files(made, artifact)
    return folder


def write_files(made: Path, artifact: Artifact, hub: bool = False) -> None:
    """The files of a conversion into an empty folder. `hub`: its tensors in `model.safetensors`, by the names that a
    model of Hugging Face's has for them. Raises ArtifactError, OSError.
    """
    tensors, aliases = named_tensors(artifact.graph_module)
    weights = MODEL if hub else WEIGHTS
    buffers = [name.partition(":")[2] for name in tensors if name.startswith("buffer:")]
    frozen = [name for name, p in artifact.graph_module.named_parameters() if not p.requires_grad]
    if hub:
        tensors = {NETWORK + name.partition(":")[2]: tensor for name, tensor in tensors.items()}
    save_file(tensors, made / weights, {"format": "pt"} if hub else None)
    save_file(examples_of(artifact.signature), made / EXAMPLE)
    (made / PLAN).write_text(artifact.plan.to_yaml(), encoding="utf-8")
    for name in (weights, EXAMPLE):  # safetensors' own mode is for nobody but the owner
        (made / name).chmod((made / PLAN).stat().st_mode)
    (made / REPORT).write_bytes(json.dumps(artifact.report.to_dict(), indent=1).encode())
    body = {
        **described(artifact.graph_module, artifact.signature, aliases),
        **({"buffers": buffers} if hub else {}),
        **({"frozen": frozen} if frozen else {}),
        "files_sha256": {n: file_sha256(made / n) for n in (weights, EXAMPLE, PLAN, REPORT)},
        "nodes": graph_json.dump(artifact.graph_module.graph),
    }
    (made / GRAPH).write_bytes(json.dumps({"sha256": digest_of(body), **body}, indent=1).encode())


def described(graph_module: fx.GraphModule, signature: Signature, aliases: Mapping[str, str]) -> dict[str, Any]:
    """What `graph.json` says of a network beside its nodes and the other files."""
    guide = signature.guide
    return {
        "format": FORMAT,
        "signature": _signature_to_json(signature),
        **({} if guide is None else {"guide": guide.to_json()}),
        "symbols": graph_module.meta.get("symbols", {}),
        "modules": _modules(graph_module),
        "aliases": aliases,
    }


def save_weights(graph_module: fx.GraphModule, path: Path) -> Path:
    """Nothing but the tensors, of a network that `save` refuses. Raises WriteError."""
    with new_file(path) as made, full_is_an_oserror():
        save_file({k.partition(":")[2]: v for k, v in named_tensors(graph_module)[0].items()}, made)
    return path


@contextmanager
def _taken_away(paths: Iterable[Path]) -> Iterator[None]:
    """Files that are gone when the block ends, and back after an error in it."""
    earlier = {p: p.read_bytes() for p in map(followed, paths) if p.is_file()}
    try:
        for path in earlier:
            path.unlink()
        yield
    except BaseException:
        for path, content in earlier.items():
            if not path.exists():
                path.write_bytes(content)
        raise


def check_nameable(graph_module: fx.GraphModule) -> None:
    """Raises ArtifactError for a custom module, whose class could not be found again."""
    _modules(graph_module)


def check_free(folder: Path) -> None:
    """Raises ArtifactError unless `save` may use this name: nothing there, an empty folder, or a conversion."""
    folder = named(folder)
    with telling(folder):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file; expected a folder's name.")
        if folder.is_dir() and any(folder.iterdir()) and not is_conversion(folder):
            raise ArtifactError(f"{folder} is not empty and holds no conversion; choose another folder.")


def is_conversion(folder: Path) -> bool:
    """Whether its graph.json is of our making, whatever the version. Many a program has a graph.json."""
    try:
        document = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"format", "sha256", "nodes", "modules"} <= document.keys()


def digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def named_tensors(graph_module: fx.GraphModule, bare: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, and the other names of tied ones. `bare`: on the meta device, without their numbers. Raises
    ArtifactError for a precision that files don't have.
    """
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    storages: set[int] = set()
    parameters = {n for n, _ in graph_module.named_parameters(remove_duplicate=False)}
    persistent = graph_module.state_dict().keys()  # what a module makes anew from its configuration is not saved
    everything = [
        *graph_module.named_parameters(remove_duplicate=False),
        *((n, b) for n, b in graph_module.named_buffers(remove_duplicate=False) if n in persistent),
    ]
    # constants that export lifted are plain tensor attributes
    names = {name for name, _ in everything}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in names:
            names.add(name)
            value: Any = graph_module
            for piece in name.split("."):
                value = getattr(value, piece)
            if not isinstance(value, torch.Tensor):  # what an operator of higher order runs
                users = ", ".join(str(user.target) for user in node.users)
                raise ArtifactError(f"{users} runs a graph of its own, which can't be saved. Write it as torch.where.")
            everything.append((name, value))
    for name, value in everything:
        if value.dtype not in FILE_DTYPES.values():
            found = str(value.dtype).removeprefix("torch.")
            raise ArtifactError(f"{name}: files have no {found}. Convert the guide in another precision.")
        if id(value) in seen:
            aliases[name] = seen[id(value)]
        else:
            seen[id(value)] = name
            prefix = "parameter:" if name in parameters else "buffer:"
            if bare:
                kept[prefix + name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
                continue
            flat = value.detach().cpu().contiguous()
            storage = flat.untyped_storage().data_ptr()
            # views of one storage are tensors of their own in the file, which holds no views
            kept[prefix + name] = flat.clone() if storage in storages else flat
            storages.add(storage)
    return kept, aliases


def _modules(graph_module: fx.GraphModule) -> dict[str, Any]:
    described = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        name = str(node.target)
        module = graph_module.get_submodule(name)
        if not isinstance(module, TargetModule):
            raise ArtifactError(
                f"{name}: a {type(module).__name__} can't be saved: only modules of registered target families can "
                "be found again. Subclass TargetModule and register its Family."
            )
        described[name] = {"target": module.family, "config": module.config()}
    return described


def examples_of(signature: Signature) -> dict[str, torch.Tensor]:
    return {s.name: s.example.contiguous() for s in signature.inputs if s.example is not None}


def _signature_to_json(signature: Signature) -> dict[str, Any]:
    inputs = [
        {"name": s.name, "dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape)}
        | {"high": s.high, "low": s.low, **({"mask": True} if s.mask else {})}
        for s in signature.inputs
    ]
    bounds = {"bounds": [bound.to_json() for bound in signature.bounds]} if signature.bounds else {}
    origin = {"origin": told} if (told := signature.origin.to_json()) else {}
    return {"inputs": inputs, "output_class": signature.output_class, **bounds, **origin}
