"""A Hugging Face folder of Thesean's, read: no code of it is run, and nothing in it is trusted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from thesean.artifact import GRAPH
from thesean.converted import Converted, load
from thesean.deploy.loaded import first_line
from thesean.errors import ArtifactError, DataError
from thesean.hf.config import TYPE, TheseanConfig
from thesean.hf.folder import CONFIG, GENERATION, read_json
from thesean.scratch import named

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# Of other models' loaders: without meaning here, or true anyway.
_IDLE = (
    "trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "state_dict", "adapter_kwargs", "offload_folder",
    "max_memory", "tp_plan", "_from_auto", "_from_pipeline", "_commit_hash", "weights_only", "ignore_mismatched_sizes",
    "key_mapping", "variant",
)  # fmt: skip


# Of a configuration, which transformers' loaders take beside their own settings.
_TOLD = ("use_cache", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id")


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was in a folder, and where and in which precision the caller wants it."""

    config: TheseanConfig
    converted: Converted
    generation: GenerationConfig | None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    name: str = ""
    wants_info: bool = False


def read(folder: Any, **kwargs: Any) -> Read:
    """`kwargs`: those of transformers' `from_pretrained`. Raises ArtifactError for the folder, DataError for them."""
    config = kwargs.pop("config", None)
    dtype = _dtype(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
    device = _device(kwargs.pop("device_map", None))
    generation = kwargs.pop("generation_config", None)
    info, max_bytes = kwargs.pop("output_loading_info", False), kwargs.pop("max_bytes", None)
    check_attention(kwargs.pop("attn_implementation", None))
    if generation is not None and not isinstance(generation, GenerationConfig):
        raise DataError(f"generation_config: expected a GenerationConfig, found {generation!r}.")
    if config is not None and not isinstance(config, (PreTrainedConfig, str, os.PathLike)):
        raise DataError(f"config: expected a configuration or a folder that has one, found {config!r}.")
    subfolder = kwargs.pop("subfolder", "")
    if not isinstance(subfolder, (str, os.PathLike)):
        raise DataError(f"subfolder: expected a name, found {subfolder!r}.")
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    for key in _IDLE:
        kwargs.pop(key, None)
    told = {key: kwargs.pop(key) for key in tuple(kwargs) if key in _TOLD}
    if unknown := next((key for key, value in kwargs.items() if value is not None), None):
        raise DataError(f"from_pretrained: a converted network has no {unknown!r}. Leave it out.")
    place = _placed(folder, hub) / (subfolder or "")
    _check_ours(place)
    converted = load(place, max_bytes)
    try:
        if not isinstance(config, TheseanConfig):
            config = TheseanConfig.from_pretrained(place)
        if generation is None and (place / GENERATION).is_file():
            generation = GenerationConfig.from_pretrained(place)
        for key, value in told.items():
            setattr(config, key, value)
    except Exception as error:  # of transformers: what a file may say has no end
        raise ArtifactError(f"{place}: {CONFIG} or {GENERATION} can't be read: {first_line(error)}") from error
    return Read(
        config=config,
        converted=converted,
        generation=generation,
        dtype=dtype,
        device=device,
        name=str(folder),
        wants_info=bool(info),
    )


def check_attention(name: Any) -> None:
    """Raises DataError for a way to compute attentions that isn't the graph's own."""
    if name not in (None, "eager", "sdpa"):
        raise DataError(f"attn_implementation: a graph has its own attentions; leave {name!r} out.")


def _placed(folder: Any, hub: dict[str, Any]) -> Path:
    """The folder, or where the Hub's is once it is here."""
    place = named(folder, "read", ArtifactError)
    if place.is_dir() or place.is_absolute() or str(folder).count("/") > 1 or str(folder).startswith("."):
        return place
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(os.fspath(folder), **{k: v for k, v in hub.items() if v is not None})
    except Exception as error:  # of a name, of the network and of the Hub
        raise ArtifactError(
            f"{folder}: no folder of this name is here, and the Hub gives none: {first_line(error)}"
        ) from error
    return Path(found)


def _check_ours(place: Path) -> None:
    """Raises ArtifactError for a folder that isn't of our making, and says what it is."""
    if not place.is_dir():
        raise ArtifactError(f"{place} is no folder. Expected one that thesean.hf.save_pretrained wrote.")
    config = read_json(place / CONFIG)
    if config is None:
        step = " Load it with thesean.load." if (place / GRAPH).is_file() else ""
        raise ArtifactError(f"{place}: {CONFIG} is missing or no JSON; thesean.hf.save_pretrained writes one.{step}")
    if config.get("model_type") != TYPE:
        raise ArtifactError(
            f"{place} holds a model of type {config.get('model_type')!r}, which isn't a conversion of Thesean. Load it "
            "with transformers."
        )


def _dtype(*given: Any) -> torch.dtype | None:
    found = next((d for d in given if d is not None), None)
    if isinstance(found, str) and found != "auto":
        found = getattr(torch, found.removeprefix("torch."), found)
    if found is None or found == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise DataError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, found {found!r}.")
    return found


def _device(given: Any) -> torch.device | None:
    """One for all of it."""
    if isinstance(given, dict):
        places = set(map(str, given.values()))
        given = next(iter(given.values())) if len(places) == 1 else given
    if given is None:
        return None
    if given in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(given)
        torch.empty(0, device=place)
    except (RuntimeError, TypeError, AssertionError) as error:  # the last of what torch was built without
        expected = "expected one device that is there, as 'cpu', 0 or 'auto'"
        raise DataError(f"device_map: {expected}, found {given!r}: {first_line(error)}") from error
    return place
