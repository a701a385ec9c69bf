"""An ONNX model as one file, or as a file and one of weights beside it, where one can't hold both.

The file of weights has a name of its own every time it is written, and the model is moved to its name last: at every
moment the model of that name finds the weights that it was written with.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thesean.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

# What a protobuf message can hold, less what the graph itself takes.
_LIMIT = 2**31 - 2**24

_SMALL = 1024  # bytes; such constants stay in the model, where an optimiser reads them

DISTRIBUTION = "thesean-compiler"  # what pyproject.toml calls it

# Keys of the metadata.
WEIGHTS, WEIGHTS_HASH = "thesean.weights", "thesean.weights_sha256"
STATES, PARITY_SEEN, PLAN, REPORT = "thesean.states", "thesean.parity", "thesean.plan", "thesean.report"
DELAY = "thesean.delay"  # how many steps late outputs come, and the input that says where a token comes in


@dataclass
class Draft:
    """A model that was written and has not taken its name. `weights` is the file beside it, if there is one."""

    path: Path
    name: Path
    weights: Path | None = None

    def write(self, model: ir.Model, beside: bool | None = None) -> None:
        """`beside`: weights in a file of their own; None where they don't fit in the model's. Its metadata tell where
        and their SHA-256. Weights are written from where they are, one tensor after the other.
        """
        import onnx_ir as ir

        model.producer_name, model.producer_version = DISTRIBUTION, _version()
        if beside or (beside is None and weights_bytes(model) > _LIMIT):
            self.weights = self.name.with_name(f"{self.name.name}.{secrets.token_hex(4)}.weights")
            ir.external_data.unload_from_model(
                model, self.name.parent, self.weights.name, size_threshold_bytes=_SMALL, max_workers=1
            )
            model.metadata_props[WEIGHTS] = self.weights.name
            model.metadata_props[WEIGHTS_HASH] = sha256(self.weights)
        self.path.write_bytes(ir.to_proto(model).SerializeToString())

    def tell(self, told: Mapping[str, str]) -> None:
        """Add to the metadata of what is written. A protobuf message that follows another is one with it."""
        import onnx

        entries = [onnx.StringStringEntryProto(key=k, value=v) for k, v in told.items()]
        with self.path.open("ab") as file:
            file.write(onnx.ModelProto(metadata_props=entries).SerializeToString())

    @property
    def bytes(self) -> int:
        return sum(p.stat().st_size for p in (self.path, self.weights) if p is not None)

    def publish(self) -> None:
        """Take the name. The weights of what had it before go."""
        earlier = weights_of(self.name)
        os.replace(self.path, self.name)
        self.weights, kept = None, self.weights
        if earlier is not None and earlier != kept:
            with suppress(OSError):
                earlier.unlink()


@contextmanager
def draft(name: Path) -> Iterator[Draft]:
    """A new file beside `name`; what was not published is gone afterwards. OSError inside becomes ExportError."""
    made = Draft(name.with_name(f".{name.name}.{secrets.token_hex(4)}.tmp"), name)
    try:
        if name.is_dir():
            raise ExportError(f"{name} is a folder; expected a file's name, such as {name / 'model.onnx'}.")
        name.parent.mkdir(parents=True, exist_ok=True)
        made.path.touch(exist_ok=False)
        yield made
    except OSError as error:
        raise ExportError(f"can't write {name}: {error.strerror or error}. Choose a writable folder.") from error
    finally:
        for left in (made.path, made.weights):
            if left is not None:
                with suppress(OSError):
                    left.unlink(missing_ok=True)


def weights_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def weights_of(path: Path) -> Path | None:
    """The file of weights that a model of ours names, where it is; None for any other file."""
    try:
        named = metadata(path).get(WEIGHTS, "")
    except ExportError:
        return None
    found = path.with_name(named) if named and Path(named).name == named else None
    return found if found is not None and found.is_file() else None


def check_weights(path: Path, told: dict[str, str]) -> None:
    """Raises ExportError where the weights that a model's metadata tell of are missing or others. ~1 s a gigabyte."""
    if WEIGHTS not in told:
        return
    weights = path.with_name(Path(told[WEIGHTS]).name)
    if not weights.is_file():
        raise ExportError(f"{path}: its weights, {weights.name}, are not beside it. Move both files together.")
    if sha256(weights) != told.get(WEIGHTS_HASH):
        raise ExportError(f"{path}: {weights.name} was changed since it was written. Export it again.")


def metadata(path: Path) -> dict[str, str]:
    """What a model says of itself; no weights are read from beside it. Raises ExportError for anything but a model."""
    return told_by(read(path))


def told_by(model: Any) -> dict[str, str]:
    """The metadata of a ModelProto."""
    return {p.key: p.value for p in model.metadata_props}


def read(path: Path) -> Any:
    """The model, without what is stored beside it. Raises ExportError."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ExportError(f"can't read {path}: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's own
        raise ExportError(f"{path} is no ONNX model.") from error
    if not model.graph.node:
        raise ExportError(f"{path} is no ONNX model.")
    return model


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a checkout
        return ""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
