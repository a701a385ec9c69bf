"""What a target is: a module that replaces a part, and the family that knows how to build it.

B batch, T time, D width of the part, E width of the target's features, H heads, K head width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from thesean.errors import TargetMismatchError

Dim = int | str
Mixing = Literal["none", "causal", "bidirectional"]

# Which regions of a part a family replaces; see Family.scope
Scope = Literal["mixing", "token-wise", "part", "members"]

# What a recurrent module carries from step to step: one tensor or a few, batch first, zeros at a sequence's start
State = torch.Tensor | tuple[torch.Tensor, ...]


class Affine(NamedTuple):
    """y = x @ weight.T + bias, as in `nn.Linear`."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """The projections of an attention, read off the graph: all affine in the part's input, per token.

    Head h of the queries is rows h*K..(h+1)*K of `query`; keys and values are repeated to as many heads where the
    guide groups them. `output` maps the concatenated heads to the part's output. `scale` multiplies q.k. `plain`: the
    part computes output(softmax(q k' scale) v), causal or over all tokens, and nothing else.
    """

    heads: int
    scale: float
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    plain: bool = False

    @cached_property
    def kv_heads(self) -> int:
        """Heads of keys and values before they were repeated: H / kv_heads queries in a row share one of each."""
        return next(
            count
            for count in range(1, self.heads + 1)
            if self.heads % count == 0 and all(_repeats(a, self.heads, count) for a in (self.key, self.value))
        )

    def grouped(self, count: int) -> tuple[Affine, Affine]:
        """Keys and values of `count` heads, a multiple of `kv_heads` that divides `heads`."""
        key, value = (
            Affine(_by_group(a.weight_OI, self.heads, count)[:, 0].flatten(0, 1),
                   _by_group(a.bias_O, self.heads, count)[:, 0].flatten())
            for a in (self.key, self.value)
        )  # fmt: skip
        return key, value


def _by_group(rows: torch.Tensor, heads: int, count: int) -> torch.Tensor:
    """(heads * K, ...) -> (count, heads / count, K, ...)."""
    return rows.unflatten(0, (count, heads // count, len(rows) // heads))


def _repeats(affine: Affine, heads: int, count: int) -> bool:
    """Whether the heads of a group are copies. They are copies of one number, so that equality is exact."""
    grouped = (_by_group(rows, heads, count) for rows in affine)
    return all(torch.equal(g, g[:, :1].expand_as(g)) for g in grouped)


@dataclass(frozen=True, kw_only=True)
class MLPFacts:
    """A token-wise MLP, read off the graph: y = down(act(up(x))), or down(act(gate(x)) * up(x)) where it is gated.

    `activation` is one of `thesean.targets.activations.ACTIVATIONS`.
    """

    up: Affine
    down: Affine
    activation: str
    gate: Affine | None = None

    @property
    def width(self) -> int:
        """Hidden neurons."""
        return int(self.up.weight_OI.shape[0])


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """All that a target may know of the part that it replaces: shapes and measured facts, never a class name."""

    path: str
    input_shape: tuple[Dim, ...]  # a str is a dynamic dimension, "batch" first
    output_shape: tuple[Dim, ...]
    mixing: Mixing  # what the probe saw along the second dimension; "none" is token-wise
    params: int
    attention: AttentionFacts | None = None
    mlp: MLPFacts | None = None
    # The output is what the whole part adds to nothing: no residual stream runs beside it. A replacement of a whole
    # block brings its own skip connection; one of a branch must not.
    is_branch: bool = False
    # (batch, channels, time): a convolution or a norm reads the second dimension as channels
    channels_first: bool = False
    # no output is below zero: the part ends in a relu or the like
    nonnegative: bool = False

    @property
    def is_sequence(self) -> bool:
        """(batch, time, width) in and out."""
        return len(self.input_shape) == len(self.output_shape) == 3 and not self.channels_first

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
    single steps, and no state means a sequence's start. A state is one tensor or a tuple of them, batch first, zeros at
    the start. Other modules return `y` alone.
    """

    family: ClassVar[str]
    stateful: bool = False
    last: nn.Linear  # a module without one has nothing to solve in closed form, and a forward of its own

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON values only: `type(self)(**config())` has the same shapes."""
        raise NotImplementedError(f"{type(self).__name__}.config")

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """What `last` reads, (..., E), and the state after it (None when stateless)."""
        raise NotImplementedError(f"{type(self).__name__}.features")

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        """From `last`'s output to the part's output shape."""
        return y

    def unshape(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of `shape`, but for leading dimensions: what `last` gives where the part should give y."""
        return y

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to `shape(last(features))`, None for nothing: a closed-form fit of `last` subtracts it."""
        return None

    def forward(self, x: torch.Tensor, state: State | None = None) -> Any:
        features, state = self.features(x, state)
        y = self.shape(self.last(features))
        skip = self.skip(x)
        if skip is not None:
            y = y + skip
        return (y, state) if self.stateful else y

    def initial_state(self, x: torch.Tensor) -> State:
        """The state that starts a sequence, batch first: zeros, (B, ...), or a tuple of such tensors."""
        raise NotImplementedError(f"{type(self).__name__}.initial_state")

    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Copy whatever of the guide's weights fits; names what was copied."""
        return ()

    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose with data what `copy_from` can't: called once, after it and before the closed form, without gradients.

        `examples` are pairs of the guide's own activations at the part's entry and exit, one a batch.
        """

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
    # "mixing": replaces the branches that mix over time and leaves token-wise branches (MLPs) to the guide;
    # "token-wise": the other way round; "part": replaces the whole part; "members": drops all members of a merged part
    # but one. The first two do that to a merged part as well, before they replace what is left.
    scope: Scope = "part"
    # The module stands in the residual stream where the part was, so that a branch's sum goes with the branch.
    removes: bool = False
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
    scope: Scope | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        name: str,
        build: Callable[[PartFacts], nn.Module] | None = None,
        *,
        scope: Scope | None = None,
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
