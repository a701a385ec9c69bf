"""What a run is of, as texts to compare: a run that is continued must be of the same guide, request, data and code."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sized
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from thesean.distill.data import Feed
from thesean.distill.stream import hash_of
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.modes import seeded
from thesean.request import Request
from thesean.targets import Target, get_family, targets

_SAMPLED = 2  # batches of the data, beside those held out


def run_facts(captured: Captured, request: Request, feed: Feed) -> dict[str, str]:
    """Name of what may have changed -> what tells it."""
    chosen = _chosen(request)
    return {
        "the guide": _hashed([captured.graph_module.code, hash_of(captured.graph_module.state_dict().values())]),
        "the recipe": request.settings.to_yaml(),
        "the plan": chosen,
        "the seed": str(request.seed),
        "the data": _data(request, feed),
        "the loss or metric": _text([request.loss, request.metric, request.outputs]),
        "the code of targets": _targets(chosen),
        "Thesean or torch": f"{_sources()} {torch.__version__}",
    }


def _chosen(request: Request) -> str:
    """What is to become what."""
    if request.edited is not None:
        return request.edited.to_yaml()
    names = ("target", "constraints", "parts", "keep", "granularity", "merge", "target_parts", "candidates")
    return _text({name: getattr(request, name) for name in names})


def _data(request: Request, feed: Feed) -> str:
    """Of what is held out, and of the first batches; of a DataLoader, which may shuffle, of its dataset's ends."""
    data, found = request.data, [batch for batch, _ in feed.held_out]
    rows = data.dataset if isinstance(data, DataLoader) else data
    count = len(rows) if isinstance(rows, Sized) else None
    with seeded(request.seed):
        if isinstance(data, DataLoader):
            found += [] if count is None else [data.dataset[0], data.dataset[count - 1]]
        elif data is not None:
            found += [batch for batch, _ in feed.take(_SAMPLED)]
    tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    return _hashed([hash_of(tensors), str(count)])


def _targets(asked: str) -> str:
    """Of the families that aren't ours and that are asked for by name."""
    home = Path(__file__).parent
    found = {_source_of(get_family(name).module) for name in targets() if name in asked}
    return _hashed(_file(path) for path in sorted(found) if not path.startswith(str(home)))


def _source_of(cls: type) -> str:
    """Its file; its name where it has none, as what is typed into a notebook."""
    try:
        return inspect.getsourcefile(cls) or cls.__qualname__
    except (TypeError, OSError):
        return cls.__qualname__


@cache
def _sources() -> str:
    home = Path(__file__).parent
    return _hashed(_file(str(path)) for path in sorted(home.rglob("*.py")))


def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return path


def _text(value: Any) -> str:
    """The same for equal values in another process: functions by their source, not by where they lie."""
    if isinstance(value, Target):
        return f"Target({', '.join(f'{k}={_text(v)}' for k, v in vars(value).items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if callable(value):
        try:
            return _hashed([inspect.getsource(inspect.unwrap(value))])
        except (OSError, TypeError):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def _hashed(texts: Iterable[str]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()
