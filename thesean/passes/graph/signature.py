"""The guide's calling convention, kept beside the graph: names, dtypes and symbolic shapes of the inputs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thesean.errors import DataError
from thesean.passes.graph.guide_class import GuideClass
from thesean.passes.graph.resample import Dim, all_shown, along_diagonals, in_a_row, is_of_pairs, resampled, sizes_of

# How long what is held is made where nobody says it: as long as nothing else that is tried
_HELD_LENGTH = 13


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One tensor input. A str in `shape` is a dynamic dimension; equal names are equal sizes."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    high: int | None = None  # integers: exclusive upper bound, the rows of the table that they index
    low: int = 0
    mask: bool = False  # floats: of the steps that hold a token, ones and zeros or what is added to scores
    held: bool = False  # the same in every chunk of a sequence: what an encoder made of its source
    # a few values that the caller gave: what is made up for probes and checks is made of them
    example: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def describe(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The sizes of a dynamic dimension that a network is right for; `most` None: however large."""

    name: str
    least: int = 1
    most: int | None = None

    def describe(self) -> str:
        if self.most is None:
            return f"{self.least} or more"
        return f"{self.least} to {self.most}" if self.least < self.most else f"{self.least} alone"

    def holds(self, size: int) -> bool:
        return self.least <= size and (self.most is None or size <= self.most)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "least": self.least, "most": self.most}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose calling convention it is: the hash of the guide's weights, and the commit of the repository that they were
    loaded from, where the guide's own configuration tells one.
    """

    weights: str | None = None
    commit: str | None = None

    def to_json(self) -> dict[str, str]:
        return {k: v for k, v in (("weights", self.weights), ("commit", self.commit)) if v}


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs in the order of the guide's `forward`, and the class of its output.

    `bounds`: of dynamic dimensions that aren't free altogether, as the guide computes otherwise at other sizes.

    `output_class` is an importable path such as "transformers.modeling_outputs.CausalLMOutput", or None when the
    output is a tensor, tuple, list or dict. `record` is that class itself where the guide is at hand: a path is not
    looked up but among transformers' own. `guide`: the class and configuration of a guide that has one.
    """

    inputs: tuple[InputSpec, ...]
    output_class: str | None = None
    bounds: tuple[Bound, ...] = ()
    record: type | None = field(default=None, compare=False, repr=False)
    origin: Origin = field(default=Origin(), compare=False)
    guide: GuideClass | None = field(default=None, compare=False, repr=False)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The dynamic dimensions' names, in order of appearance, but for those that are of held inputs alone."""
        seen: dict[str, None] = {}
        for spec in self.inputs:
            if not spec.held:
                seen.update({d: None for d in spec.shape if isinstance(d, str)})
        return tuple(seen)

    @property
    def fixed_rows(self) -> int | None:
        """How many rows a batch has to have; None where it may have any number."""
        first = next((s.shape[0] for s in self.inputs if s.shape and not s.held), 1)
        return first if isinstance(first, int) and not any(s.startswith("batch") for s in self.symbols) else None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Positional and named arguments -> named tensors. Raises DataError for a misfit."""
        names = [spec.name for spec in self.inputs]
        if len(args) > len(names):
            raise DataError(f"expected at most {len(names)} inputs ({', '.join(names)}), found {len(args)}.")
        bound = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise DataError(f"unknown input {name!r}; the converted model takes: {', '.join(names)}.")
            if name in bound:
                raise DataError(f"input {name!r} is given twice.")
            bound[name] = value
        missing = [n for n in names if n not in bound]
        if missing:
            raise DataError(f"missing input {missing[0]!r}; the converted model takes: {', '.join(names)}.")
        ordered = {n: bound[n] for n in names}
        self.check(ordered)
        return ordered

    def check(self, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
        """Sizes of the dynamic dimensions. Raises DataError with input, found and expected."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            value = inputs[spec.name]
            if not isinstance(value, torch.Tensor):
                raise DataError(f"{spec.name}: expected a tensor, found {type(value).__name__}.")
            if value.dtype != spec.dtype:
                raise DataError(
                    f"{spec.name}: expected {spec.dtype}, found {value.dtype}. Convert it: x.to({spec.dtype})."
                )
            if value.layout != torch.strided:
                raise DataError(f"{spec.name}: expected a dense tensor, found one of {value.layout}: x.to_dense().")
            if value.ndim != len(spec.shape):
                raise DataError(f"expected {spec.describe()}, found shape {tuple(value.shape)}.")
            for dim, (want, have) in enumerate(zip(spec.shape, value.shape, strict=True)):
                expected = sizes.setdefault(want, have) if isinstance(want, str) else want
                if expected == have:
                    continue
                found = f"expected {spec.describe()}, found shape {tuple(value.shape)}"
                if isinstance(want, str):
                    raise DataError(f"{found} ({want}={expected}).")
                raise DataError(
                    f"{found}: dimension {dim} was captured at {expected} alone. Pad or cut it to that, or convert "
                    f"with example inputs of {have}."
                )
        for bound in self.bounds:
            if bound.name in sizes and not bound.holds(sizes[bound.name]):
                raise DataError(
                    f"{bound.name}: expected {bound.describe()}, found {sizes[bound.name]}: the guide computes "
                    "otherwise there, or not at all, and was captured at another size. Example inputs of such a size "
                    "give that branch, where there is one."
                )
        return sizes

    def first_rows(self, inputs: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The first rows of a batch, as views; an input without a batch as it is."""
        few = dict(inputs)
        for spec in self.inputs:
            for dim, size in enumerate(spec.shape):
                if size == "batch":
                    few[spec.name] = few[spec.name].narrow(dim, 0, min(count, few[spec.name].shape[dim]))
        return few

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether sizes by name are within the bounds."""
        return self.within(sizes) == sizes

    def within(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The nearest sizes by name that are within the bounds."""
        found = dict(sizes)
        for bound in self.bounds:
            if bound.name in found:
                found[bound.name] = max(bound.least, min(found[bound.name], bound.most or found[bound.name]))
        return found

    def out_of_range(self, inputs: dict[str, torch.Tensor]) -> str:
        """What is wrong with ids that no table holds, "" where nothing is known to be. Reads all of them."""
        for spec in self.inputs:
            value = inputs.get(spec.name)
            if value is None or spec.high is None or value.is_floating_point() or not value.numel():
                continue
            low, high = (int(v) for v in value.aminmax())
            if low < 0 or high >= spec.high:
                return f"{spec.name} holds {low if low < 0 else high}; expected ids from 0 to {spec.high - 1}"
        return ""

    def random_inputs(
        self, sizes: dict[str, int], seed: int = 0, device: str = "cpu", fresh: bool = False, in_order: bool = False
    ) -> dict[str, torch.Tensor]:
        """Inputs of these sizes, like the examples that the guide was captured with (`resampled`); `fresh` ones are
        none of them, those `in_order` are they themselves, one after another to a sequence. Without an example,
        integers are uniform below `high`, floats standard normal, booleans True. What is held alone has a size of its
        own, where `sizes` don't tell one.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = {**{d: _HELD_LENGTH for s in self.inputs if s.held for d in s.shape if isinstance(d, str)}, **sizes}
        before = self.example_sizes
        made = {}
        for spec in self.inputs:
            wanted = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
            if spec.example is not None and spec.example.numel() and is_of_pairs(spec.shape):
                value = along_diagonals(spec.example, wanted)
            elif spec.mask and spec.example is not None:
                value = all_shown(spec.example, wanted)
            elif spec.example is not None:
                own = in_a_row(spec.example, spec.shape, sizes) if in_order else None
                made_up = resampled(spec.example, spec.shape, sizes, before, generator, spec.high, fresh)
                value = made_up if own is None else own
            else:
                value = _without_example(spec, wanted, generator)
            made[spec.name] = value.to(device)
        return made

    @property
    def lengths(self) -> tuple[str, ...]:
        """The dynamic dimensions that are no batch: time, or an image's sides."""
        return tuple(s for s in self.symbols if not s.startswith("batch"))

    @property
    def example_sizes(self) -> dict[str, int]:
        """Of the dynamic dimensions, in the kept examples."""
        return sizes_of((s.shape, s.example) for s in self.inputs if s.example is not None)


def _without_example(spec: InputSpec, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if spec.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(spec.dtype)
    if spec.high is None:
        return torch.ones(shape, dtype=spec.dtype)  # a mask: everything visible
    low = min(spec.low, spec.high - 1)
    return torch.randint(low, spec.high, shape, generator=generator, dtype=spec.dtype)


# Modules of transformers that define outputs. A file may name one of these to be imported, and no other code.
_OUTPUTS = re.compile(r"transformers\.(modeling_outputs|models\.[a-z0-9_]+\.modeling_[a-z0-9_]+)")


class Fields(dict[str, Any]):
    """What a guide returns as a class of its own, where that is not at hand: by name, and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}: it holds {', '.join(self)}.") from None


pytree.register_pytree_node(
    Fields,
    lambda held: (list(held.values()), list(held)),
    lambda values, names: Fields(zip(names, values, strict=True)),
)


def output_wrapper(signature: Signature) -> Callable[[Any], Any]:
    """Turns the graph's output into the guide's output class; `Fields` where that is not at hand.

    The class is the one that the guide was seen to return, or one of transformers' output classes that a file names,
    filled with tensors alone. Nothing else that a file says is imported or called.
    """
    cls = signature.record or _output_class(signature.output_class)
    if cls is None and signature.output_class is None:
        return lambda output: output
    cls = Fields if cls is None else cls
    return lambda output: cls(**output) if isinstance(output, dict) else output


def fits_record(signature: Signature, value: Any) -> bool:
    """Whether an output, or the nodes that it is made of, could fill the class that the signature names."""
    cls = _output_class(signature.output_class)
    return cls is None or not isinstance(value, dict) or value.keys() <= {f.name for f in fields(cls)}


def _output_class(path: str | None) -> type | None:
    module_name, _, name = (path or "").rpartition(".")
    if not _OUTPUTS.fullmatch(module_name):
        return None
    try:
        module = importlib.import_module(module_name)
        from transformers.utils import ModelOutput
    except Exception:  # not installed, or not so that it can be imported: its outputs are dicts then
        return None
    found = vars(module).get(name)
    known = isinstance(found, type) and issubclass(found, ModelOutput) and is_dataclass(found)
    return found if known else None
