"""Models of transformers made of folders and of conversions, and known to its Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from thesean.converted import Converted
from thesean.errors import DataError
from thesean.hf.config import TYPE, TheseanConfig
from thesean.hf.folder import configured
from thesean.hf.modeling import TheseanForCausalLM, TheseanForSequenceClassification, TheseanModel
from thesean.hf.reading import Read, read
from thesean.passes.graph.surgery import clone

AutoConfig.register(TYPE, TheseanConfig, exist_ok=True)
AutoModel.register(TheseanConfig, TheseanModel, exist_ok=True)
AutoModelForCausalLM.register(TheseanConfig, TheseanForCausalLM, exist_ok=True)
for _auto in (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
):
    _auto.register(TheseanConfig, TheseanForSequenceClassification, exist_ok=True)


def from_pretrained(
    folder: str | Path, dtype: torch.dtype | str | None = None, device_map: Any = None, **kwargs: Any
) -> TheseanModel:
    """The model in a folder, or in a repository on the Hub: a TheseanForCausalLM where it is a language model.

    dtype: torch.bfloat16, "float16"...; left out, as it was saved. device_map: one device for all of it, "cuda",
    "auto" or {"": 0}. max_bytes: as in `thesean.load`. Raises ArtifactError for a folder that is incomplete, altered
    or not of Thesean, DataError for settings that a converted network doesn't have.
    """
    found = read(folder, dtype=dtype, device_map=device_map, **kwargs)
    return _class_of(found.config).of(found)


def from_converted(converted: Converted) -> TheseanModel:
    """A model of transformers with a copy of a converted network's weights."""
    if not isinstance(converted, Converted):
        found = type(converted).__name__
        raise DataError(f"from_converted: expected what thesean.compile or thesean.load gives, found {found}.")
    config, generation = configured(converted)
    own = Converted(clone(converted.module), converted.signature, converted.plan, converted.report)
    return _class_of(config).of(Read(config=config, converted=own, generation=generation))


def _class_of(config: TheseanConfig) -> type[TheseanModel]:
    return TheseanModel if config.roles is None else TheseanForCausalLM
