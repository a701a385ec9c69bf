"""A Hugging Face folder, written: config.json, model.safetensors, generation_config.json, a model card, the tokenizer's
files, and the graph, plan and report of a saved conversion. `thesean.load` reads it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from thesean.artifact import (
    EXAMPLE,
    GRAPH,
    MODEL,
    PLAN,
    REPORT,
    WEIGHTS,
    Artifact,
    check_nameable,
    is_conversion,
    write_files,
)
from thesean.converted import Converted
from thesean.deploy.tokenizer import copy_tokenizer, is_of_a_tokenizer
from thesean.errors import ArtifactError
from thesean.hf.card import WRITTEN, Card, card_text
from thesean.hf.config import TYPE, TheseanConfig, config_of
from thesean.hf.follow import Place
from thesean.hf.roles import roles_of
from thesean.passes.graph.modes import usual_settings
from thesean.passes.graph.signature import Signature
from thesean.replace_folder import replacing
from thesean.scratch import named, telling
from thesean.write_file import full_is_an_oserror

CONFIG, GENERATION, README = "config.json", "generation_config.json", "README.md"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a folder is made of. `generation` None: it is no language model, and has no settings of one."""

    artifact: Artifact
    config: PreTrainedConfig
    generation: GenerationConfig | None
    tokenizer: Any = None


def save_pretrained(
    converted: Converted, folder: str | Path, tokenizer: Any = None, licence: str | None = None
) -> Path:
    """Write a folder that `thesean.hf.from_pretrained` reads and, where `thesean.hf` was imported, transformers' Auto
    classes. What else is in the folder stays, a card that somebody wrote among it.

    tokenizer: a folder, or what has `save_pretrained`; its files go with it. licence: of the guide, for the card: a
    conversion is made of the guide's weights. Raises ArtifactError for a folder that holds another model, and for
    custom modules whose class could not be found again; WriteError when it can't be written.
    """
    if not isinstance(converted, Converted):
        raise ArtifactError(
            f"save_pretrained: expected what thesean.compile or thesean.load gives, found {type(converted).__name__}."
        )
    check_licence(licence)
    config, generation = configured(converted)
    config.licence = licence
    artifact = Artifact(
        graph_module=converted.module,
        signature=converted.signature,
        plan=converted.plan,
        report=converted.report,
    )
    return write_folder(
        Written(artifact=artifact, config=config, generation=generation, tokenizer=tokenizer), named(folder)
    )


def configured(converted: Converted) -> tuple[TheseanConfig, GenerationConfig | None]:
    """Its configuration, and the settings of `generate` where it is a language model."""
    module, signature = converted.module, converted.signature
    with usual_settings():
        roles = roles_of(module, signature)
    config = config_of(signature, module, roles, Place.of(module).dtype)
    return config, None if roles is None else generation_of(signature, config)


def generation_of(signature: Signature, config: PreTrainedConfig) -> GenerationConfig:
    """The guide's settings of `generate`, as far as it has some."""
    told = {} if signature.guide is None else dict(signature.guide.generation or {})
    told |= {k: v for k in _TOKENS if k not in told and (v := getattr(config, k, None)) is not None}
    return GenerationConfig(**{k: v for k, v in told.items() if k != "transformers_version"})


def write_folder(written: Written, folder: Path) -> Path:
    """Raises ArtifactError, WriteError; nothing is changed then."""
    check_name(folder)
    check_nameable(written.artifact.graph_module)
    ours = {GRAPH, MODEL, WEIGHTS, PLAN, REPORT, EXAMPLE, CONFIG, GENERATION}
    if writes_card(folder):
        ours.add(README)
    with telling(folder), full_is_an_oserror(), replacing(folder, _Names(ours, written.tokenizer)) as made:
        special = copy_tokenizer(written.tokenizer, made, getattr(written.config, "vocab_size", None))
        write_files(made, written.artifact, hub=True)
        _complete(written, special)
        (made / CONFIG).write_text(written.config.to_json_string(use_diff=True), encoding="utf-8")
        if written.generation is not None:
            (made / GENERATION).write_text(written.generation.to_json_string(), encoding="utf-8")
        if README in ours:
            (made / README).write_text(_card(written), encoding="utf-8")
    return folder


def check_licence(licence: Any) -> None:
    """Raises ArtifactError."""
    if licence is not None and not isinstance(licence, str):
        raise ArtifactError(f"licence: expected a name such as 'apache-2.0', or None, found {licence!r}.")


def writes_card(folder: Path) -> bool:
    """Whether there is none, or one of ours."""
    try:
        return WRITTEN in (folder / README).read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def check_name(folder: Path, type_: str = TYPE) -> None:
    """Raises ArtifactError for a file, and for a folder with another model in it: what would be half overwritten.
    WriteError for what can't be a name.
    """
    with telling(folder):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file; expected a folder's name.")
        has_graph, has_config, has_weights = ((folder / name).exists() for name in (GRAPH, CONFIG, MODEL))
    ours = has_graph and is_conversion(folder)
    if has_graph and not ours:
        raise ArtifactError(f"{folder} holds a {GRAPH} of another program; choose another folder.")
    found = (read_json(folder / CONFIG) or {}).get("model_type")
    if has_config and found != type_ and not (ours and found is None):
        told = f"a model of type {found!r}" if found else f"a {CONFIG} of another program"
        raise ArtifactError(f"{folder} holds {told}; choose another folder.")
    if has_weights and not has_config and not ours:
        raise ArtifactError(f"{folder} holds a {MODEL} without a {CONFIG}, which isn't ours; choose another folder.")


def read_json(path: Path) -> dict[str, Any] | None:
    """None for what isn't there, or is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class _Names(frozenset[str]):
    """What is replaced of an earlier folder: these, and a tokenizer's files where there is a new one."""

    def __new__(cls, names: set[str], tokenizer: Any) -> _Names:
        made = super().__new__(cls, names)
        made.tokenizer = tokenizer is not None
        return made

    tokenizer: bool

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (self.tokenizer and is_of_a_tokenizer(str(name)))


def _complete(written: Written, special: Mapping[str, Any]) -> None:
    """Tokens that only the tokenizer tells."""
    for holder in (written.config, written.generation):
        for key in _TOKENS if holder is not None else ():
            if getattr(holder, key, None) is None and special.get(key) is not None:
                setattr(holder, key, special[key])


def _card(written: Written) -> str:
    artifact = written.artifact
    return card_text(
        Card(
            plan=artifact.plan,
            report=artifact.report,
            guide=artifact.signature.guide,
            licence=getattr(written.config, "licence", None),
            generates=written.generation is not None,
            has_tokenizer=written.tokenizer is not None,
            trained_further=bool(getattr(written.config, "trained_further", False)),
        )
    )
