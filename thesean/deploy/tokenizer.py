"""A tokenizer's files, copied beside a network's."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from thesean.errors import ExportError, first_line
from thesean.scratch import named

# What a tokenizer is saved as. Weights that may stand beside it are not copied.
TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_TOLD = ("tokenizer_config.json", "config.json", "generation_config.json")  # the last word has the last one
_SPECIAL = ("bos", "eos", "pad")


def is_of_a_tokenizer(name: str) -> bool:
    """Whether a file of this name is one that a tokenizer is saved as."""
    return any(fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)


def copy_tokenizer(tokenizer: Any, made: Path, words: int | None) -> dict[str, Any]:
    """Its files, and the numbers of its special tokens. `tokenizer`: a folder, what has `save_pretrained`, or None;
    `words`: the tokens that the network knows, where that is told. Raises ExportError, for a tokenizer with more too.
    """
    if tokenizer is None:
        return {}
    special = _copied(tokenizer, made)
    largest = _largest(made)
    if words is not None and largest is not None and largest >= words:
        raise ExportError(
            f"tokenizer: its tokens go up to {largest}, the network knows 0 to {words - 1}: they don't fit. Give the "
            "guide's own tokenizer."
        )
    return special


def _copied(tokenizer: Any, made: Path) -> dict[str, Any]:
    if isinstance(tokenizer, nn.Module):
        raise ExportError(f"tokenizer: expected a tokenizer or a folder of one, found {type(tokenizer).__name__}.")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(made)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
        return {name: number for name, number in ids.items() if number is not None}
    source = named(tokenizer, "read", ExportError)
    files = {path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
    if not files:
        raise ExportError(f"tokenizer: expected a folder with tokenizer files, such as tokenizer.json, found {source}.")
    for path in sorted(files):
        shutil.copyfile(path, made / path.name)
    special: dict[str, Any] = {}
    for name in _TOLD:
        told = _read(source / name)
        special |= {f"{k}_token_id": told[f"{k}_token_id"] for k in _SPECIAL if told.get(f"{k}_token_id") is not None}
    return special


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"tokenizer: {path} is no JSON: {first_line(error)}") from error
    return told if isinstance(told, dict) else {}


def _largest(made: Path) -> int | None:
    """The largest id that a tokenizer gives, where it is saved as one file that says so."""
    told = _read(made / "tokenizer.json")
    model = told.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = (
        list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab))) if isinstance(vocab, list) else []
    )
    added = told.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((n for n in ids if isinstance(n, int)), default=None)
