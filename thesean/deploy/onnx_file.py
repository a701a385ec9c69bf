"""An ONNX model as one file, or as a file and one of weights beside it, where one can't hold both.

The file of weights has a name of its own every time it is written, and the model is moved to its name last: at every
moment the model of that name finds the weights that it was written with.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thesean.deploy.told import StateRow, told_as
from thesean.errors import ExportError
from thesean.scratch import file_sha256, followed, leftovers, named, remove, scratch, scratches, sync, telling
from thesean.write_file import made_in, mode_kept

if TYPE_CHECKING:
    import onnx_ir as ir

# What a protobuf message can hold, less what the graph itself takes.
LIMIT = 2**31 - 2**24

_SMALL = 1024  # bytes; such constants stay in the model, where an optimiser reads them

DISTRIBUTION = "thesean-compiler"  # what pyproject.toml calls it

_OURS = re.compile(r".+\.[0-9a-f]{8}\.weights", re.DOTALL)  # names of weights
_MOVING = "moving"

# Keys of the metadata.
WEIGHTS, WEIGHTS_HASH = "thesean.weights", "thesean.weights_sha256"
STATES, PARITY_SEEN, PLAN, REPORT = "thesean.states", "thesean.parity", "thesean.plan", "thesean.report"
ROWS, TOGETHER = "thesean.rows", "together"  # where the rows of a batch have to start at once
SIZES = "thesean.sizes"  # bounds of dimensions by name, where other sizes are another network
IDS = "thesean.ids"  # of inputs that index a table by numbers from 0 on: how many rows it has
UNCHECKED = "thesean.unchecked"  # why not all could be compared, where the caller let that pass
UNTRIED = "thesean.untried"  # whole numbers that positions are compared with, too large to try steps past them
GUIDE = "thesean.guide"  # the hash of its weights, and their commit where one is known
DELAY = "thesean.delay"  # how many steps late outputs come, and the input that says where a token comes in
OPERATORS = "thesean.operators"  # how linear attention is written: "fused" or "products"
BESIDE_ENCODER = "thesean.encoder"  # of a decoder: its encoder's file, that file's SHA-256, and what it gives
BESIDE_DECODER = "thesean.decoder"  # of an encoder: its decoder's file


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
        if beside or (beside is None and weights_bytes(model) > LIMIT):
            self.weights = self.path.with_name(f"{_shortened(self.name.name)}.{secrets.token_hex(4)}.weights")
            ir.external_data.unload_from_model(
                model, self.path.parent, self.weights.name, size_threshold_bytes=_SMALL, max_workers=1
            )
            model.metadata_props[WEIGHTS] = self.weights.name
            model.metadata_props[WEIGHTS_HASH] = file_sha256(self.weights)
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
        """Take the name, the weights before the model. The weights of what had it before go."""
        self.take_name()
        self.clear()

    def take_name(self) -> None:
        """And leave the weights of what had it before where they are."""
        for made in (self.weights, self.path):
            if made is not None:
                sync(made)
        try:
            if self.weights is not None:
                (self.path.parent / _MOVING).write_text(self.weights.name, encoding="utf-8")  # for who cleans up then
                self.weights = Path(shutil.move(self.weights, self.name.with_name(self.weights.name)))
            os.replace(self.path, self.name)
        except BaseException:
            if self.weights is not None:
                with suppress(OSError):
                    self.weights.unlink()
            raise

    def clear(self) -> None:
        """Remove the weights of what had the name before."""
        _remove_weights(self.name, self.path.parent)


@contextmanager
def draft(path: Any) -> Iterator[Draft]:
    """A new file, which is gone afterwards unless it was published. A link is followed. OSError inside becomes
    WriteError.
    """
    path = named(path)
    with telling(path):
        name = followed(path)
        if name.is_dir():
            raise ExportError(f"{path} is a folder; expected a file's name, such as {path / 'model.onnx'}.")
        name.parent.mkdir(parents=True, exist_ok=True)
        mode = mode_kept(name)
        for left in leftovers(name):
            remove(left)
        _remove_weights(name)
        with scratch(name) as folder:
            made = Draft(made_in(folder, name), name)
            made.path.touch()
            if mode is not None:
                made.path.chmod(mode)
            yield made


def _remove_weights(name: Path, own: Path | None = None) -> None:
    """Those of our making beside a model of that name that neither it nor another one tells of, and that no process is
    about to give it, but for whoever has the scratch folder `own`.
    """
    prefix = _shortened(name.name) + "."
    found = [p for p in name.parent.iterdir() if p.name.startswith(prefix) and _OURS.fullmatch(p.name)]
    if not found:
        return
    # in this order: what was there before and is told of neither now will not be
    moving = {word for room in scratches(name) if room != own for word in _moving(room)}
    standing = weights_of(name)
    others = [p for p in name.parent.glob("*.onnx*") if p != name and p not in found and p.is_file()]
    for path in found:
        if path != standing and path.name not in moving and not any(_mentions(p, path.name) for p in others):
            with suppress(OSError):
                path.unlink()


def _moving(room: Path) -> list[str]:
    try:
        return [(room / _MOVING).read_text(encoding="utf-8")]
    except (OSError, ValueError):
        return []


def _mentions(path: Path, word: str) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(word.encode()) >= 0
    except ValueError:  # empty
        return False
    except OSError:
        return True


def _shortened(name: str) -> str:
    """With room for what makes it the name of weights, in a file system's 255 bytes."""
    return name.encode(errors="ignore")[:200].decode(errors="ignore")  # protobuf has no bytes that are no letters


def weights_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def weights_of(path: Path) -> Path | None:
    """The file of weights that a model of ours names, where it is; None for any other file."""
    if not path.is_file():
        return None
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
    if file_sha256(weights) != told.get(WEIGHTS_HASH):
        raise ExportError(f"{path}: {weights.name} was changed since it was written. Export it again.")


def metadata(path: Path) -> dict[str, str]:
    """What a model says of itself; no weights are read from beside it. Raises ExportError for anything but a model."""
    return told_by(read(path))


def told_by(model: Any) -> dict[str, str]:
    """The metadata of a ModelProto."""
    return {p.key: p.value for p in model.metadata_props}


Declared = tuple[tuple[str, str, tuple[int | str, ...]], ...]


def declared(path: Path) -> tuple[Declared, Declared, tuple[str, ...]]:
    """Inputs and states as (name, dtype of numpy, shape), and the names of other outputs. Raises ExportError."""
    import onnx

    model = read(path)
    states = [row.name for row in told_as(told_by(model), STATES, tuple[StateRow, ...], ())]
    rows = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        rows[value.name] = (value.name, "bool_" if dtype == "bool" else dtype, shape)
    outputs = [value.name for value in model.graph.output]
    own = tuple(outputs[: len(outputs) - len(states)])
    inputs = tuple(row for name, row in rows.items() if name not in states)
    return inputs, tuple(rows[name] for name in states if name in rows), own


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
