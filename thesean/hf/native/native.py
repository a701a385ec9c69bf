"""A conversion written back as a checkpoint of its guide's class, which runs without Thesean."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from thesean.converted import Converted
from thesean.deploy.tokenizer import copy_tokenizer
from thesean.errors import NativeError
from thesean.hf.card import Card, card_text
from thesean.hf.folder import README, check_licence, check_name, writes_card
from thesean.hf.native.assign import Misfit
from thesean.hf.native.configure import NOTHING, Search, variants
from thesean.hf.native.judge import Judge
from thesean.hf.native.layers import Layers, layers_of
from thesean.hf.native.pieces import Pieces, pieces_of
from thesean.passes.graph.guide_class import GuideClass
from thesean.passes.graph.modes import usual_settings
from thesean.replace_folder import replacing
from thesean.scratch import named, telling
from thesean.write_file import full_is_an_oserror

# Modules of transformers that define models. A file may name one of these to be imported, and no other code.
_MODELS = re.compile(r"transformers\.models\.[a-z0-9_]+\.modeling_[a-z0-9_]+")


def to_native(converted: Converted) -> PreTrainedModel:
    """The conversion as a model of its guide's own class, with other numbers in its configuration: fewer neurons where
    all MLPs were narrowed alike, fewer heads, of queries or of keys and values, fewer layers where some were copied.

    Its outputs were seen to be the conversion's, to 1e-5 of their scale. Raises NativeError that says which part fits
    no network of that class, or how far apart the outputs are.
    """
    if not isinstance(converted, Converted):
        found = type(converted).__name__
        raise NativeError(f"to_native: expected what thesean.compile or thesean.load gives, found {found}.")
    guide = converted.signature.guide
    if guide is None:
        raise NativeError(
            "the guide has no configuration, or the conversion was saved before it was kept: there is nothing to build "
            "one of its class from. Use thesean.hf.save_pretrained."
        )
    cls = _class_of(guide)
    pieces = pieces_of(converted.module, converted.plan)
    with usual_settings(), _quietly():
        model = _found(cls, guide.config, pieces, converted)
    weight = next(iter(converted.module.parameters()))
    model = model.to(weight.dtype).to(weight.device)
    if guide.generation is not None and model.can_generate():
        told = {k: v for k, v in guide.generation.items() if k != "transformers_version"}
        model.generation_config = GenerationConfig(**told)
    return model


def save_native(
    converted: Converted, folder: str | Path, tokenizer: Any = None, licence: str | None = None
) -> PreTrainedModel:
    """`to_native`, saved as transformers saves it, with a model card and the tokenizer's files. Raises NativeError,
    ArtifactError for a folder that holds another model, and WriteError.
    """
    folder = named(folder)
    check_licence(licence)
    guide = converted.signature.guide if isinstance(converted, Converted) else None
    check_name(folder, str((guide.config if guide else {}).get("model_type", "")))
    model = to_native(converted)
    names = _Written((README,) if writes_card(folder) else ())
    with telling(folder), full_is_an_oserror(), replacing(folder, names) as made:
        model.save_pretrained(made)
        copy_tokenizer(tokenizer, made, getattr(model.config, "vocab_size", None))
        card = Card(
            plan=converted.plan,
            report=converted.report,
            guide=guide,
            licence=licence,
            generates=model.can_generate(),
            has_tokenizer=tokenizer is not None,
            native=type(model).__name__,
        )
        if README in names:
            (made / README).write_text(card_text(card), encoding="utf-8")
    return model


class _Written(frozenset[str]):
    """What a checkpoint of transformers' replaces of an earlier one."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or any(fnmatchcase(str(name), pattern) for pattern in _CHECKPOINT)


_CHECKPOINT = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def _class_of(guide: GuideClass) -> type[PreTrainedModel]:
    """The class itself where the guide was at hand, else one of transformers' own."""
    found: Any = guide.record
    if found is None:
        module, _, name = guide.path.rpartition(".")
        try:
            found = vars(importlib.import_module(module)).get(name) if _MODELS.fullmatch(module) else None
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise NativeError(
            f"{guide.path} is no model class of transformers: a checkpoint of it can't be built here. Use "
            "thesean.hf.save_pretrained."
        )
    return found


def _built(cls: type[PreTrainedModel], config: Mapping[str, Any], more: Mapping[str, Any]) -> PreTrainedModel:
    kind: Any = cls.config_class
    model: PreTrainedModel = cls(kind.from_dict(dict(config)), **more)
    return model


def _found(
    cls: type[PreTrainedModel], config: Mapping[str, Any], pieces: Pieces, converted: Converted
) -> PreTrainedModel:
    """The first network that has a place for all weights and gives the conversion's outputs."""
    nearest: Misfit = NOTHING
    judge = Judge.of(converted)
    for more in variants(cls):
        search = Search(partial(_built, cls), Layers({}, {}), pieces, more)
        whole = search.skeleton(config)
        if whole is None:
            continue
        search.layers = layers_of(whole, pieces.paths)
        for fit in search.fits(config):
            model = search.build(fit.config, fit.more).eval()
            if judge.fill(model, search.layers, pieces, fit.ways):
                assert isinstance(model, PreTrainedModel)
                return model
        nearest = max(nearest, search.nearest, key=lambda misfit: misfit.rank)
    raise NativeError(judge.told(cls) or f"{nearest.told} No {cls.__name__} is this network.")


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers warns of configurations that are only tried."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
