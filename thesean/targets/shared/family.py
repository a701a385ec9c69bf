"""What a target is: a module that replaces a part, and the family that knows how to build it.

B batch, T time, D width of the part, E width of the target's features, H heads, K head width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from thesean.errors import TargetMismatchError
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.module import TargetModule

# Which regions of a part a family replaces; see Family.scope
Scope = Literal["mixing", "token-wise", "part", "members"]


class Options(BaseModel):
    """The base of a family's options; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(NamedTuple):
    """Where a target goes. `look` runs the guide on the caller's example: what the part is given there, and mask_BT,
    True at tokens, where some are hidden.
    """

    facts: PartFacts
    look: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One target architecture. A file in this folder that defines `TARGET` registers it."""

    name: str
    summary: str
    options: type[Options]
    module: type[TargetModule]
    # A plan calls it on the meta device, to count: the constructor may draw and fill tensors, and read no values.
    build: Callable[[PartFacts, Any], TargetModule]
    # "mixing": replaces the branches that mix over time and leaves token-wise branches (MLPs) to the guide;
    # "token-wise": the other way round; "part": replaces the whole part; "members": drops all members of a merged part
    # but one. The first two do that to a merged part as well, before they replace what is left.
    scope: Scope = "part"
    # The module stands in the residual stream where the part was, so that a branch's sum goes with the branch.
    removes: bool = False
    # It takes channels out of feature maps: of such a part it replaces all, where there are channels inside, and parts
    # in a row that have none of their own are one part, for what lies between two convolutions is then inside.
    channels: bool = False
    # It takes units out of a guide's own recurrent cells.
    units: bool = False
    # Values for options that are left open, chosen by what the guide does at all the places that one target takes in a
    # part; they stand in the plan.
    decide: Callable[[Sequence[Place], Any], dict[str, Any]] | None = None
    # A whole part that is a block of an attention and an MLP is told as one (PartFacts.block), and ends with its last
    # sum: a norm after that stays the guide's. Of a family that replaces less by default, granularity="block" asks it.
    block: bool = False
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
        if not isinstance(name, str):
            raise TargetMismatchError(f"a target is named by its family, or by a name of yours; found {name!r}.")
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
