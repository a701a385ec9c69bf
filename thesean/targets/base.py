"""What a target is: a module that replaces a part, and the family that knows how to build it.

B batch, T time, D width of the part, E width of the target's features, H heads, K head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from thesean.errors import TargetMismatchError

Dim = int | str
Mixing = Literal["none", "causal", "bidirectional"]


class Affine(NamedTuple):
    """y = x @ weight.T + bias, as in `nn.Linear`."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """The projections of an attention, read off the graph: all affine in the part's input, per token.

    Head h of the queries is rows h*K..(h+1)*K of `query`; keys and values are repeated to as many heads where the
    guide groups them. `output` maps the concatenated heads to the part's output. `scale` multiplies q.k.
    """

    heads: int
    scale: float
    query: Affine
    key: Affine
    value: Affine
    output: Affine


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """All that a target may know of the part that it replaces: shapes and measured facts, never a class name."""

    path: str
    input_shape: tuple[Dim, ...]  # a str is a dynamic dimension, "batch" first
    output_shape: tuple[Dim, ...]
    mixing: Mixing  # what the probe saw along the second dimension; "none" is token-wise
    params: int
    attention: AttentionFacts | None = None

    @property
    def is_sequence(self) -> bool:
        """(batch, time, width) in and out."""
        return len(self.input_shape) == len(self.output_shape) == 3

    @property
    def width_in(self) -> int:
        return int(self.input_shape[-1])

    @property
    def width_out(self) -> int:
        return int(self.output_shape[-1])

    def mismatch(self, target: str, found: str, expected: str, advice: str) -> TargetMismatchError:
        return TargetMismatchError(f"{self.path}: target {target!r} expected {expected}, found {found}. {advice}")


class TargetModule(nn.Module):
    """The base of all replacements. The output is `last(features)`, so that `last` can be solved in closed form.

    A stateful module's `forward(x_BTD, state=None)` returns `(y_BTD, state)`; running T steps at once equals T
    single steps, and no state means a sequence's start. Other modules return `y` alone.
    """

    family: ClassVar[str]
    stateful: bool = False
    last: nn.Linear

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON values only: `type(self)(**config())` has the same shapes."""
        raise NotImplementedError(f"{type(self).__name__}.config")

    def features(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `last` reads, (..., E), and the state after it (None when stateless)."""
        raise NotImplementedError(f"{type(self).__name__}.features")

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        """From `last`'s output to the part's output shape."""
        return y

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to `shape(last(features))`, None for nothing: a closed-form fit of `last` subtracts it."""
        return None

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        features, state = self.features(x, state)
        y = self.shape(self.last(features))
        skip = self.skip(x)
        if skip is not None:
            y = y + skip
        return (y, state) if self.stateful else y

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        """The state that starts a sequence, batch first: zeros, (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__}.initial_state")

    def state_shape(self) -> tuple[int, ...]:
        """The state's shape without the batch."""
        return tuple(self.initial_state(torch.zeros(1, 1, 1)).shape[1:])

    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Copy whatever of the guide's weights fits; names what was copied."""
        return ()

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        """Multiply-adds times two for one forward at these sizes of the dynamic dimensions."""
        tokens = 1
        for dim in part.input_shape[:-1] if part.is_sequence else part.input_shape[:1]:
            tokens *= sizes[dim] if isinstance(dim, str) else dim
        return 2 * tokens * sum(p.numel() for p in self.parameters() if p.ndim >= 2)


class Options(BaseModel):
    """The base of a family's options; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One target architecture. A file in this folder that defines `TARGET` registers it."""

    name: str
    summary: str
    options: type[Options]
    module: type[TargetModule]
    build: Callable[[PartFacts, Any], TargetModule]
    # "mixing": replaces the branch that mixes over time and leaves token-wise branches (MLPs) to the guide;
    # "part": replaces the whole part.
    scope: Literal["mixing", "part"] = "part"
    # Raises TargetMismatchError; `build` may take for granted that it passed.
    check: Callable[[PartFacts, Any], None] = lambda part, options: None


@dataclass(frozen=True)
class Target:
    """A choice of target: a family's name with options, or a builder of your own.

        Target("gru", width=256)
        Target("mine", build=lambda part: MyModule(part.width_in, part.width_out))

    `scope="part"` makes a recurrent family replace a whole block, MLP included: faster, and it loses more.
    Raises UnknownNameError, and TargetMismatchError for options that the family doesn't have.
    """

    name: str
    build: Callable[[PartFacts], nn.Module] | None = None
    scope: Literal["mixing", "part"] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        name: str,
        build: Callable[[PartFacts], nn.Module] | None = None,
        *,
        scope: Literal["mixing", "part"] | None = None,
        **options: Any,
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "build", build)
        object.__setattr__(self, "scope", scope)
        object.__setattr__(self, "options", dict(options))

    def __str__(self) -> str:
        extra = {**({"scope": self.scope} if self.scope else {}), **self.options}
        return self.name + (f"({', '.join(f'{k}={v}' for k, v in extra.items())})" if extra else "")


def parse_options(family: Family, options: dict[str, Any]) -> Options:
    """Validated options; raises TargetMismatchError that names the wrong one and the known ones."""
    try:
        return family.options(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        known = ", ".join(family.options.model_fields) or "none"
        raise TargetMismatchError(
            f"target {family.name!r}: option {where!r}: {first['msg']}. known options: {known}"
        ) from error
