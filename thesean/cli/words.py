"""From words on the command line to objects: `module:name`, a Hugging Face folder, `GLOB=NAME:key=value`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from torch import nn

from thesean import plain_yaml
from thesean.distill.outputs import OutputKind
from thesean.errors import MissingExtraError, TheseanError
from thesean.targets.shared.family import Target

KEEP = "keep"
NONE = "none"
OUTPUT_KINDS = get_args(OutputKind)


class ArgumentError(TheseanError, ValueError):
    """A word on the command line that doesn't name what it should."""


def load_guide(word: str) -> nn.Module:
    """`package.module:factory` or a local Hugging Face folder -> the guide.

    Raises ArgumentError, and MissingExtraError when a folder is given and transformers isn't installed.
    """
    if Path(word).is_dir():
        return load_pretrained(Path(word))
    if ":" not in word:
        raise ArgumentError(
            f"guide {word!r}: expected package.module:factory or a local Hugging Face folder, found neither. "
            "Nothing is downloaded: fetch the model into a folder first."
        )
    found = load_object(word, "guide", call=True)
    if not isinstance(found, nn.Module):
        raise ArgumentError(f"guide {word!r}: expected an nn.Module, found {type(found).__name__}.")
    return found


def load_data(word: str, option: str) -> Any:
    """`package.module:factory` -> batches that can be read more than once. Raises ArgumentError."""
    found = load_object(word, option, call=True)
    if not hasattr(found, "__iter__") and not hasattr(found, "__getitem__"):
        raise ArgumentError(f"{option} {word!r}: expected an iterable of batches, found {type(found).__name__}.")
    if hasattr(found, "__next__"):
        raise ArgumentError(
            f"{option} {word!r}: expected batches that can be read again for each stage, found "
            f"a {type(found).__name__}, which is empty after the first pass. Return a list or a DataLoader."
        )
    return found


def load_object(word: str, option: str, *, call: bool) -> Any:
    """`package.module:name` with the working directory on sys.path -> that object.

    With `call`, functions and classes are called with no arguments, and anything else is taken as it is (an
    nn.Module instance, a DataLoader). Raises ArgumentError that says whether module, name or call failed.
    """
    module_name, _, name = word.partition(":")
    if not module_name or not name:
        raise ArgumentError(f"{option} {word!r}: expected package.module:name, such as models.gpt:make.")
    cwd = os.getcwd()
    if cwd not in sys.path:
        sys.path.insert(0, cwd)  # a console script has its own folder there instead
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        reason = (
            f"no module {error.name!r} in {cwd} or the installed packages"
            if missing and isinstance(error, ModuleNotFoundError)
            else f"importing {module_name} raised {type(error).__name__}: {error}"
        )
        raise ArgumentError(f"{option} {word!r}: {reason}.") from error
    found: Any = module
    for step in name.split("."):
        if not hasattr(found, step):
            raise ArgumentError(f"{option} {word!r}: {module_name} has no {name!r}{_hint(step, found)}.")
        found = getattr(found, step)
    if not call or not (inspect.isroutine(found) or inspect.isclass(found)):
        return found
    try:
        return found()
    except Exception as error:
        raise ArgumentError(
            f"{option} {word!r}: calling it with no arguments raised {type(error).__name__}: {error}."
        ) from error


def load_pretrained(folder: Path) -> nn.Module:
    """The model that `config.json` names under "architectures", from this folder and without the network.

    Code inside the folder is not run. Raises ArgumentError, MissingExtraError.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArgumentError(
            f"guide {folder}: expected a Hugging Face folder with a config.json, found none."
        ) from error
    except (OSError, ValueError) as error:
        raise ArgumentError(f"guide {folder}: config.json can't be read: {error}.") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ArgumentError(
            f"guide {folder}: config.json has no 'architectures' entry, so the model's class is unknown. "
            "Give a factory instead: package.module:factory."
        )
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    made: Any = getattr(transformers, names[0], None)
    known = inspect.isclass(made) and issubclass(made, transformers.PreTrainedModel)
    if not known:
        raise ArgumentError(
            f"guide {folder}: transformers {transformers.__version__} has no model {names[0]!r}. Code in a model's "
            "folder is not run; give a factory instead: package.module:factory."
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        model = made.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ArgumentError(f"guide {folder}: {names[0]} can't be loaded: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def parse_targets(words: Sequence[str]) -> str | Target | dict[str, str | Target]:
    """`["gru:width=256"]` -> a Target, `["h.0=keep", "h.*=rnn"]` -> a mapping in that order. Raises ArgumentError."""
    split = [_split_glob(word) for word in words]
    if len(split) == 1 and split[0][0] is None:
        target = parse_target(split[0][1])
        if target == KEEP:
            raise ArgumentError(
                "--target keep: everything kept is no conversion. Name the parts: --target 'GLOB=keep'."
            )
        return target
    mapping: dict[str, str | Target] = {}
    for glob, word in split:
        if glob is None:
            raise ArgumentError(
                f"--target {word!r}: with more than one --target each needs its parts, GLOB=NAME, "
                "such as --target 'transformer.h.*=rnn'."
            )
        if glob in mapping:
            raise ArgumentError(f"--target: the parts {glob!r} are given twice.")
        mapping[glob] = parse_target(word)
    return mapping


def parse_target(word: str) -> str | Target:
    """`gru:width=256,scope=part` -> Target("gru", width=256, scope="part"); without options, or `keep`, the name."""
    name, colon, tail = word.partition(":")
    name = name.strip()
    if not name:
        raise ArgumentError(f"--target {word!r}: expected NAME or NAME:key=value,key=value, found no name.")
    if not colon:
        return name
    if name == KEEP:
        raise ArgumentError(f"--target {word!r}: 'keep' takes no options.")
    options: dict[str, Any] = {}
    for item in tail.split(","):
        key, equals, text = (piece.strip() for piece in item.partition("="))
        if not (equals and key.isidentifier() and text):
            raise ArgumentError(f"--target {word!r}: expected key=value after the colon, found {item!r}.")
        if key in options:
            raise ArgumentError(f"--target {word!r}: option {key!r} is given twice.")
        options[key] = _scalar(text)
    scope = options.pop("scope", None)
    if scope not in (None, "mixing", "token-wise", "part"):
        raise ArgumentError(
            f"--target {word!r}: expected scope=mixing, scope=token-wise or scope=part, found scope={scope}."
        )
    reserved = {"name", "build"} & options.keys()
    if reserved:
        raise ArgumentError(f"--target {word!r}: {reserved.pop()!r} is not an option of a target.")
    return Target(name, scope=scope, **options)


def parse_budget(words: Sequence[str]) -> dict[str, Any] | list[dict[str, Any]] | None:
    """`["latency_ms=5", "context=512"]` -> constraints of target "auto"; a list of two where a value is two, as in
    speedup=1.25,1.5; None without words. Raises ArgumentError.
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = (piece.strip() for piece in word.partition("="))
        values = [piece.strip() for piece in text.split(",")]
        if not (equals and key.isidentifier() and all(values)):
            raise ArgumentError(f"--constraint {word!r}: expected key=value, such as latency_ms=5 or context=512.")
        if key in found:
            raise ArgumentError(f"--constraint: {key!r} is given twice. Several budgets are {key}=A,B,C.")
        found[key] = [_scalar(value) for value in values]
    several = [key for key, values in found.items() if len(values) > 1]
    if len(several) > 1:
        raise ArgumentError(f"--constraint: {' and '.join(several)} have several values each; one of them may.")
    if not several:
        return {key: value for key, (value,) in found.items()} or None
    return [{k: v if k == several[0] else values[0] for k, values in found.items()} for v in found[several[0]]]


def parse_outputs(words: Sequence[str]) -> dict[str, str] | None:
    """`["logits=softmax", "scale=ignore"]` -> how each output is compared; None without words. Raises ArgumentError."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, kind = (piece.strip() for piece in word.rpartition("="))
        if not (equals and name and kind in OUTPUT_KINDS):
            raise ArgumentError(
                f"--outputs {word!r}: expected NAME=KIND, of {', '.join(OUTPUT_KINDS)}; such as logits=softmax."
            )
        if name in found:
            raise ArgumentError(f"--outputs: {name!r} is given twice.")
        found[name] = kind
    return found or None


def parse_dynamic(words: Sequence[str]) -> dict[str, dict[int, str]] | None:
    """`["x=0:batch,1:time"]` -> {"x": {0: "batch", 1: "time"}}; {} for the word none, None without words.

    Raises ArgumentError.
    """
    if list(words) == [NONE]:
        return {}
    found: dict[str, dict[int, str]] = {}
    for word in words:
        name, equals, tail = (piece.strip() for piece in word.rpartition("="))
        dims = found.setdefault(name, {})
        for item in tail.split(","):
            at, colon, label = (piece.strip() for piece in item.partition(":"))
            if not (equals and name and colon and at.isascii() and at.isdigit() and label):
                raise ArgumentError(
                    f"--dynamic {word!r}: expected INPUT=DIMENSION:NAME, such as x=0:batch,1:time, or {NONE} alone to "
                    f"fix all; found {item!r}."
                )
            if int(at) in dims:
                raise ArgumentError(f"--dynamic: dimension {at} of {name!r} is given twice.")
            dims[int(at)] = label
    return found or None


def parse_sizes(word: str | None, option: str) -> tuple[int, ...] | None:
    """ "128,512" -> (128, 512); None for no word. Raises ArgumentError."""
    if word is None:
        return None
    pieces = [piece.strip() for piece in word.split(",")]
    for piece in pieces:
        if not (piece.isascii() and piece.isdigit() and int(piece)):
            raise ArgumentError(
                f"{option} {word!r}: expected whole numbers of 1 or more with commas between, such as "
                f"{option} 128,512; found {piece!r}."
            )
    return tuple(map(int, pieces))


def _split_glob(word: str) -> tuple[str | None, str]:
    """`h.*=gru:width=2` -> ("h.*", "gru:width=2"); the equals sign of an option comes after a colon."""
    head = word.partition(":")[0]
    glob, equals, _ = head.partition("=")
    if not equals:
        return None, word
    if not glob.strip():
        raise ArgumentError(f"--target {word!r}: expected GLOB=NAME, found no glob.")
    return glob.strip(), word[len(glob) + 1 :]


def _scalar(text: str) -> Any:
    """As YAML reads it: 256, 0.5, true, null, rnn. Text that isn't YAML stays text."""
    try:
        value = plain_yaml.read(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float, str)) or value is None else text


def _hint(name: str, owner: Any) -> str:
    near = difflib.get_close_matches(name, [n for n in dir(owner) if not n.startswith("_")], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
