"""A saved folder, read: data, whoever wrote it. What doesn't fit is refused, by ArtifactError alone, before any of it
is used; SECURITY.md says what is promised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file
from torch import fx, nn
from torch.utils import _pytree as pytree
from typing_extensions import TypedDict

from thesean.artifact import (
    EXAMPLE,
    FILE_DTYPES,
    FORMAT,
    GRAPH,
    MODEL,
    NETWORK,
    PLAN,
    REPORT,
    WEIGHTS,
    Artifact,
    digest_of,
)
from thesean.errors import ArtifactError, TheseanError
from thesean.passes.graph import graph_json
from thesean.passes.graph.fitting import Fitting
from thesean.passes.graph.guide_class import GuideClass
from thesean.passes.graph.shapes import Shapes
from thesean.passes.graph.signature import Bound, InputSpec, Origin, Signature, fits_record
from thesean.passes.graph.unchecked import look_first
from thesean.passes.plan.plan import Plan
from thesean.replace_folder import standing
from thesean.report.conversion import ConversionReport
from thesean.scratch import file_sha256
from thesean.targets import TargetModule, rebuild

# What a folder may take where `max_bytes` doesn't say, and how many bytes of Python's a byte of JSON becomes
_LEAST_BYTES, _PARSED = 2 * 2**30, 16
_SHARDS = "model-*-of-*.safetensors"
_LARGEST = 2**20  # of a target's settings: constructors count to some of them

_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _InputRow(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    name: str
    dtype: str
    shape: list[_Size | str]
    high: NotRequired[Annotated[int, Field(ge=1, lt=2**63)] | None]
    low: NotRequired[_Size]
    mask: NotRequired[bool]


class _OriginRow(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    weights: str
    commit: str


class _BoundRow(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    name: str
    least: Annotated[int, Field(ge=1, lt=2**63)]
    most: Annotated[int, Field(ge=1, lt=2**63)] | None


class _GuideRow(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    path: str
    config: dict[str, Any]
    generation: NotRequired[dict[str, Any]]


_ROWS = TypeAdapter(list[_InputRow])
_BOUNDS = TypeAdapter(list[_BoundRow])
_ORIGIN = TypeAdapter(_OriginRow)
_GUIDE = TypeAdapter(_GuideRow)


def load(folder: str | Path, max_bytes: int | None = None) -> Artifact:
    """Raises ArtifactError for a missing, truncated or altered folder, and for one that takes more than `max_bytes`:
    its files, and what one call of the example's sizes holds at once. Left out, it may be 32 times its files, or 2 GiB.

    Runs nothing that the folder names, and reads no weight before every node was seen to fit.
    """
    with refusing(folder):
        return _load(standing(Path(folder)), max_bytes)


@contextmanager
def refusing(where: Path | str) -> Iterator[None]:
    """Whatever is raised inside is an ArtifactError."""
    try:
        yield
    except ArtifactError:
        raise
    except TheseanError as error:  # an unknown target, a plan that is none
        raise ArtifactError(f"{where} can't be read: {error}") from error
    except Exception as error:  # of json, safetensors, torch and the file system: what a file may say has no end
        raise ArtifactError(f"{where} can't be read: {type(error).__name__}: {str(error)[:500]}.") from error


def _load(folder: Path, max_bytes: int | None) -> Artifact:
    weights = MODEL if (folder / MODEL).is_file() and not (folder / WEIGHTS).is_file() else WEIGHTS
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int)):
        raise ArtifactError(f"max_bytes: expected a whole number of bytes, found {max_bytes!r}.")
    for name in (GRAPH, weights, PLAN, REPORT):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: {_missing(folder, name)}; this is not a complete conversion.")
    names = [n for n in (GRAPH, weights, PLAN, REPORT, EXAMPLE) if (folder / n).exists()]
    if odd := next((n for n in names if not (folder / n).is_file()), None):  # a pipe would be waited for
        raise ArtifactError(f"{folder / odd} is no file; the folder was altered.")
    size = sum((folder / n).stat().st_size for n in names)
    limit = max(_LEAST_BYTES, 32 * size) if max_bytes is None else max_bytes
    if size + _PARSED * (folder / GRAPH).stat().st_size > limit:
        raise ArtifactError(f"{folder} holds {size:,} bytes, and more once read; at most {limit:,} are allowed.")
    try:
        document = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / GRAPH} can't be read: {error}.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{folder / GRAPH}: expected format {FORMAT}; the file is of another version or altered.")
    body = {k: v for k, v in document.items() if k != "sha256"}
    graph = graph_json.load(body.get("nodes"))  # before the checksum: an operator outside the list has its own message
    if digest_of(body) != document.get("sha256"):
        raise ArtifactError(f"{folder / GRAPH} does not match its checksum; the file was altered.")
    for name in names[1:]:
        if (name != EXAMPLE or name in body["files_sha256"]) and file_sha256(folder / name) != (
            body["files_sha256"][name]
        ):
            raise ArtifactError(f"{folder / name} does not match its checksum; the file is truncated or altered.")
    has_example = EXAMPLE in names and EXAMPLE in body["files_sha256"]
    report = ConversionReport.from_dict(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    plan = Plan.from_yaml(folder / PLAN)
    kinds = _kinds_of(body) if weights == MODEL else None
    written = Written(
        body=body,
        graph=graph,
        examples=load_file(folder / EXAMPLE) if has_example else {},
        shapes=_named(_shapes(folder / weights), kinds),
        plan=plan,
        report=report,
        bytes=size,
    )
    signature, modules = fitted(written, limit, folder)
    # clones: memory of their own, aligned as torch would, so that products round as they did before saving
    tensors = _named({k: v.clone() for k, v in load_file(folder / weights).items()}, kinds)
    root = _root(graph, body, tensors, modules, folder)
    look_first(graph)
    graph_module = fx.GraphModule(root, graph)
    graph_module.meta["symbols"] = _texts(body["symbols"])
    graph_module.eval()
    return Artifact(graph_module=graph_module, signature=signature, plan=plan, report=report)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What files say, or would: all but the weights' numbers."""

    body: dict[str, Any]
    graph: fx.Graph
    examples: dict[str, torch.Tensor]
    shapes: dict[str, torch.Tensor]  # on the meta device
    plan: Plan
    report: ConversionReport | None = None
    bytes: int  # of files


def _probed(symbol: str, signature: Signature, plan: Plan, report: ConversionReport | None) -> int:
    """A size at which the network is known to run: the example's, or that of the plan's figures."""
    known = {**plan.sizes, **signature.example_sizes}
    length = None if report is None else report.train_length
    return known.get(symbol, 2 if symbol.startswith("batch") else length or 8)


def fitted(written: Written, limit: int, where: Path | str) -> tuple[Signature, dict[str, TargetModule]]:
    """The signature and the modules, once every node was seen to fit. Raises ArtifactError."""
    body, graph = written.body, written.graph
    signature = replace(_signature_from_json(body["signature"], written.examples), guide=_guide(body))
    if not fits_record(signature, graph.output_node().args[0]):
        raise ArtifactError(f"{where}: the output's keys are not those of its output_class.")
    modules = {name: _rebuilt(told) for name, told in body["modules"].items()}
    fitting = Fitting(
        module=_root(graph, body, written.shapes, modules, where),
        signature=signature,
        sizes={s: _probed(s, signature, written.plan, written.report) for s in signature.symbols},
        limit=limit,
        kinds={name: _kind(told, modules[name]) for name, told in body["modules"].items()},
    )
    held = fitting.run(graph) + sum(t.nbytes for m in modules.values() for t in (*m.parameters(), *m.buffers()))
    if written.bytes + held > limit:
        raise ArtifactError(
            f"{where}: a call holds {held:,} bytes beside {written.bytes:,} of files; at most {limit:,} are allowed. "
            "Raise max_bytes= for a folder that you trust."
        )
    return signature, modules


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file without their numbers."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return {
            name: torch.empty(s.get_shape(), dtype=FILE_DTYPES[s.get_dtype()], device="meta")
            for name, s in slices.items()
        }


def _guide(body: dict[str, Any]) -> GuideClass | None:
    """What it says of the guide's class: names and numbers, of which nothing is imported here."""
    if body.get("guide") is None:
        return None
    told = _GUIDE.validate_python(body["guide"], strict=True)
    return GuideClass(path=told["path"], config=told["config"], generation=told.get("generation"))


def _kinds_of(body: dict[str, Any]) -> set[str]:
    """The names of a Hugging Face folder's tensors that are buffers."""
    buffers = body.get("buffers")
    if not isinstance(buffers, list) or not all(isinstance(name, str) for name in buffers):
        raise ValueError("expected the names of the buffers")
    return set(buffers)


def _named(tensors: dict[str, torch.Tensor], buffers: set[str] | None) -> dict[str, torch.Tensor]:
    """Tensors as `weights.safetensors` calls them; `buffers`: of those of a Hugging Face folder."""
    if buffers is None:
        return tensors
    paths = {key: key.removeprefix(NETWORK) for key in tensors}
    return {("buffer:" if path in buffers else "parameter:") + path: tensors[key] for key, path in paths.items()}


def _rebuilt(described: dict[str, Any]) -> TargetModule:
    """A target module as its configuration says, without memory."""
    numbers = [n for n in pytree.tree_leaves(described["config"]) if isinstance(n, int)]
    if any(abs(n) > _LARGEST for n in numbers):
        raise ArtifactError(f"target {described['target']!r:.80}: a setting is beyond {_LARGEST:,}.")
    with torch.device("meta"), Shapes():
        return rebuild(described["target"], described["config"]).eval()


def _kind(described: dict[str, Any], module: TargetModule) -> str:
    """Equal for modules that compute equal shapes and types from equal ones."""
    dtypes = [str(t.dtype) for t in module.state_dict().values()]
    return json.dumps([described, dtypes], sort_keys=True)


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError("expected texts by their names")
    return value


def _missing(folder: Path, name: str) -> str:
    if name == WEIGHTS and next(folder.glob(_SHARDS), None) is not None:
        return f"its weights lie in several files ({_SHARDS}), which aren't read: save it anew, as one {MODEL}"
    of_hub = name == WEIGHTS and (folder / "config.json").is_file()
    return f"{MODEL if of_hub else name} is missing"


def read_plan_and_report(folder: str | Path) -> tuple[Plan, ConversionReport]:
    """What a conversion became and what it cost, without its weights. Raises ArtifactError, PlanError."""
    folder = standing(Path(folder))
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return Plan.from_yaml(folder / PLAN), ConversionReport.from_dict(report)
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder}: {REPORT} is missing; this is not a complete conversion.") from error
    except (OSError, RecursionError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, TheseanError):
            raise
        raise ArtifactError(f"{folder / REPORT} can't be read: {type(error).__name__}: {error}.") from error


def _root(
    graph: fx.Graph, body: dict[str, Any], tensors: dict[str, torch.Tensor], modules: dict[str, Any], folder: Path | str
) -> nn.Module:
    """A module tree that holds what the graph reads and calls. `modules` get the tensors that are theirs."""
    root = nn.Module()
    left, aliases = dict(tensors), _texts(body["aliases"])
    try:
        for name, described in body["modules"].items():
            prefix = f"{name}."
            own = [key for key in left if key.partition(":")[2].startswith(prefix)]
            state = {key.partition(":")[2].removeprefix(prefix): left.pop(key) for key in own}
            for alias, original in aliases.items():  # tied: loaded twice, and made one below
                kept = next((tensors[k] for k in (f"parameter:{original}", f"buffer:{original}") if k in tensors), None)
                if alias.startswith(prefix) and kept is not None:
                    state[alias.removeprefix(prefix)] = kept
            # with the precision that it was saved in, tensor by tensor
            modules[name].load_state_dict(state, assign=True)
            if state and not _on_meta(state.values()) and _on_meta(_all_tensors(modules[name])):
                # what a module makes anew is not in the file
                modules[name] = rebuild(described["target"], described["config"])
                modules[name].load_state_dict(state, assign=True)
            root.add_module(name, modules[name])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: a target module does not fit its weights: {error}") from error
    for key, value in left.items():
        kind, _, path = key.partition(":")
        if kind not in ("parameter", "buffer") or not graph_json.is_attribute_path(path):
            raise ArtifactError(f"{folder}: {key!r:.80} is not a tensor's name.")
        _attach(root, path, nn.Parameter(value) if kind == "parameter" else value)
    for name, original in aliases.items():
        if not graph_json.is_attribute_path(name):
            raise ArtifactError(f"{folder}: {name!r:.80} is not a tensor's name.")
        _attach(root, name, _held(root, original, folder))
    frozen = body.get("frozen", [])
    if not isinstance(frozen, list):
        raise ArtifactError(f"{folder}: expected the names of the frozen parameters.")
    held = dict(root.named_parameters())
    for name in held.keys() & set(frozen):
        held[name].requires_grad_(False)
    for node in graph.find_nodes(op="get_attr"):
        node.meta["val"] = _held(root, str(node.target), folder)
    for node in graph.find_nodes(op="call_module"):
        if str(node.target) not in body["modules"]:
            raise ArtifactError(f"{folder}: the graph calls {node.target!r}, which is not among its modules.")
    return root


def _all_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that are neither."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            yield from (t for t in held.values() if isinstance(t, torch.Tensor))


def _on_meta(tensors: Iterable[torch.Tensor]) -> bool:
    return any(t.device.type == "meta" for t in tensors)


def _held(root: nn.Module, path: str, folder: Path | str) -> torch.Tensor:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, torch.Tensor):
        raise ArtifactError(f"{folder}: the weights hold no tensor {path!r}.")
    return value


def _attach(root: nn.Module, path: str, value: Any) -> None:
    *holders, leaf = path.split(".")
    module = root
    for name in holders:
        if not isinstance(getattr(module, name, None), nn.Module):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def _signature_from_json(data: dict[str, Any], examples: dict[str, torch.Tensor]) -> Signature:
    specs = []
    for row in _ROWS.validate_python(data["inputs"], strict=True):
        dtype = graph_json.DTYPES[row["dtype"]]
        example = examples.get(row["name"])
        if example is not None and (example.dtype != dtype or example.ndim != len(row["shape"])):
            raise ValueError(f"the example of {row['name']!r} is not of its dtype and rank")
        fields: dict[str, Any] = {**row, "dtype": dtype, "shape": tuple(row["shape"])}
        specs.append(InputSpec(**fields, example=example))
    rows = _BOUNDS.validate_python(data.get("bounds", []), strict=True)
    bounds = tuple(Bound(name=row["name"], least=row["least"], most=row["most"]) for row in rows)
    told = _ORIGIN.validate_python(data.get("origin", {}), strict=True)
    origin = Origin(weights=told.get("weights"), commit=told.get("commit"))
    signature = Signature(inputs=tuple(specs), output_class=data["output_class"], bounds=bounds, origin=origin)
    if {b.name for b in bounds} - set(signature.symbols) or any(
        b.most is not None and b.most < b.least for b in bounds
    ):
        raise ValueError("bounds of no dimension, or of no size")
    if not isinstance(signature.output_class, str | None):
        raise ValueError("output_class is neither text nor null")
    given = {s.name: s.example for s in specs if s.example is not None}
    if given:
        partial = Signature(inputs=tuple(s for s in specs if s.example is not None))
        partial.check(given)  # equal names are equal sizes
    return signature
