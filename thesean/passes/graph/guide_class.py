"""The class that a guide is of, and its configuration as data: what is needed to build one of another size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GuideClass:
    """`path` is importable, "transformers.models.llama.modeling_llama.LlamaForCausalLM"; `config` and `generation`, the
    settings of its `generate`, are JSON. `record` is the class itself where the guide is at hand: a path is not looked
    up but among transformers' own.
    """

    path: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    record: type | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, model: Any) -> GuideClass | None:
        """None for a module that has no configuration which says itself as data."""
        config = _data(getattr(model, "config", None))
        if config is None:
            return None
        kind = type(model)
        path = f"{kind.__module__}.{kind.__qualname__}"
        generation = {
            k: v
            for k, v in (_data(getattr(model, "generation_config", None)) or {}).items()
            if v is not None and (v is not False or k == "use_cache")
        }
        return cls(path=path, config=config, generation=generation or None, record=kind)

    def to_json(self) -> dict[str, Any]:
        told = {"path": self.path, "config": dict(self.config)}
        return told if self.generation is None else told | {"generation": dict(self.generation)}


def _data(config: Any) -> dict[str, Any] | None:
    """A configuration as JSON has it."""
    write = getattr(config, "to_json_string", None)
    if not callable(write):
        return None
    try:
        found = json.loads(write(use_diff=False))
    except Exception:  # of somebody else's configuration; nothing but a checkpoint of its class needs it
        return None
    if not isinstance(found, dict):
        return None
    return {k: v for k, v in found.items() if not k.startswith("_")}  # such as the folder that it was loaded from
