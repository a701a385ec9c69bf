"""What a run is of, as texts to compare: a run that is continued must be of the same guide, request, data and code."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from thesean.distill.callbacks import length_of
from thesean.distill.data import Feed
from thesean.distill.saved_activations import guide_hash
from thesean.distill.stream import generators_of
from thesean.fact_texts import hashed, made_with, text_of, text_of_values
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.modes import seeded
from thesean.request import Request
from thesean.targets import get_family, targets

# Of data: so many batches of a list, or rows of a dataset, from all over it; of what only comes in an order the first
# batches, beside those held out.
_LOOKED_AT, _SAMPLED = 64, 2

MADE_WITH = "what the loss or metric is made with"


def run_facts(captured: Captured, request: Request, feed: Feed) -> dict[str, str]:
    """Name of what may have changed -> what tells it."""
    chosen, guide = _chosen(request), captured.graph_module
    frozen = [name for name, p in guide.named_parameters() if not p.requires_grad]
    return {
        "the guide": hashed([guide_hash(guide), str(frozen)]),
        "the recipe": request.settings.to_yaml(),
        "the plan": chosen,
        "the seed": str(request.seed),
        "the data": _data(request, feed),
        "the loss or metric": text_of([request.loss, request.metric, request.outputs]),
        MADE_WITH: text_of(
            [made_with(function) for function in (request.loss, request.metric) if function is not None]
        ),
        "the code of targets": _targets(chosen),
        "Thesean or torch": f"{_sources()} {torch.__version__}",
    }


def _chosen(request: Request) -> str:
    """What is to become what."""
    if request.edited is not None:
        return request.edited.to_yaml()
    names = ("target", "constraints", "parts", "keep", "granularity", "merge", "target_parts", "candidates")
    return text_of({name: getattr(request, name) for name in names})


def _data(request: Request, feed: Feed) -> str:
    """Of what is held out, as it came and as it is read, and of some of the rest; of a DataLoader, which may shuffle,
    of rows of its dataset, and of how it makes batches of them.
    """
    data = request.data
    with seeded(request.seed):
        return hashed([text_of_values(feed.held_out), text_of_values(_looked_at(data, feed)), _ways(data)])


def _looked_at(data: Any, feed: Feed) -> list[Any]:
    rows = data.dataset if isinstance(data, DataLoader) else data
    count = length_of(rows)
    if count is None or not (isinstance(rows, Sequence) or (rows is not data and hasattr(rows, "__getitem__"))):
        by_rows = isinstance(data, DataLoader) or data is None
        return [count, *([] if by_rows else feed.take(_SAMPLED))]
    some = min(count, _LOOKED_AT)
    return [count, *(rows[k * (count - 1) // max(1, some - 1)] for k in range(some))]


def _ways(data: Any) -> str:
    """How a DataLoader makes batches; a generator by the seed that it was given, for it has drawn since, if this is not
    its first run.
    """
    if not isinstance(data, DataLoader):
        return ""
    samplers = [type(sampler).__qualname__ for sampler in (data.sampler, data.batch_sampler)]
    seeds = [generator.initial_seed() for generator in generators_of(data)]
    return f"{samplers} {data.batch_size} {data.drop_last} {seeds} {text_of(data.collate_fn)}"


def _targets(asked: str) -> str:
    """Of the families that aren't ours and that are asked for by name."""
    home = Path(__file__).parent
    found = {_source_of(get_family(name).module) for name in targets() if name in asked}
    return hashed(_file(path) for path in sorted(found) if not path.startswith(str(home)))


def _source_of(cls: type) -> str:
    """Its file; its name where it has none, as what is typed into a notebook."""
    try:
        return inspect.getsourcefile(cls) or cls.__qualname__
    except (TypeError, OSError):
        return cls.__qualname__


@cache
def _sources() -> str:
    home = Path(__file__).parent
    return hashed(_file(str(path)) for path in sorted(home.rglob("*.py")))


def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return path
