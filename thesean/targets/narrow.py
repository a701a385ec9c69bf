"""The same part with fewer hidden neurons; fewer heads where it is an attention, channels where it convolves, units
where it is a recurrent cell.

B batch, T time, D width of the part, O its output width, E hidden neurons kept, W hidden neurons of the guide
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from thesean.errors import NumericalError
from thesean.targets.shared.activations import ACTIVATIONS
from thesean.targets.shared.facts import CellFacts, MLPFacts, PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.fewer_channels import NarrowChannelsOptions, check_channels
from thesean.targets.shared.fewer_heads import NarrowHeadsOptions, check_heads
from thesean.targets.shared.module import State, TargetModule
from thesean.targets.shared.registry import get_family
from thesean.targets.shared.select_features import fold, moments, select_features
from thesean.targets.shared.sequence import WidthOptions, describe

# Tokens that the selection looks at, per neuron of the guide. From 2 to 8 a neuron the loss falls by 2% more.
TOKENS_PER_NEURON = 4


class NarrowMLP(TargetModule):
    """y = last(act(up(x))), or last(act(gate(x)) * up(x)), with `width` of the guide's own neurons. Stateless.

    (..., D) -> (..., O), the same for every token. `copy_from` keeps the neurons with the largest weights; `prepare`
    chooses them anew by what they do to the guide's output, and folds the others into `last` by ridge regression.
    """

    family = "narrow"
    last: nn.Linear

    def __init__(self, *, width_in: int, width_out: int, width: int, activation: str, gated: bool = False) -> None:
        """Raises ValueError for an activation that is not one of `ACTIVATIONS`."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.width_in = width_in
        self.width_out = width_out
        self.width = width
        self.activation = activation
        self.up = nn.Linear(width_in, width)
        self.gate = nn.Linear(width_in, width) if gated else None
        self.last = nn.Linear(width, width_out)

    def config(self) -> dict[str, Any]:
        return {
            "width_in": self.width_in,
            "width_out": self.width_out,
            "width": self.width,
            "activation": self.activation,
            "gated": self.gate is not None,
        }

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return act(self.up(x)), None
        return act(self.gate(x)) * self.up(x), None

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        return 2 * part.rows(sizes, -1) * sum(p.numel() for p in self.parameters() if p.ndim >= 2)

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """The neurons whose weights' norms multiply to the most: a guess without data. Not the solved layer's own."""
        facts = part.mlp
        if facts is None or not self._fits(facts):
            return ()
        score_W = facts.up.weight_OI.norm(dim=1) * facts.down.weight_OI.norm(dim=0)
        if facts.gate is not None:
            score_W = score_W * facts.gate.weight_OI.norm(dim=1)
        self._keep(facts, score_W.topk(self.width).indices.sort().values)
        return ("up", "down") if self.gate is None else ("up", "gate", "down")

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose the neurons and fold the others in, on the guide's inputs of the part, in O(W^2 (N + E)).

        Raises NumericalError where the activations are not finite.
        """
        facts = part.mlp
        if facts is None or not self._fits(facts) or self.width == facts.width or not examples:
            return
        rows = [x.reshape(-1, x.shape[-1]) for x, _ in examples]
        stride = math.ceil(sum(len(x_ND) for x_ND in rows) / (TOKENS_PER_NEURON * facts.width))
        try:
            known = moments(facts.hidden(x_ND[::stride]) for x_ND in rows)
        except ValueError as error:
            raise NumericalError(f"{part.path}: can't choose neurons, {error}. Look for NaN in the data.") from error
        kept_E = select_features(known.covariance_EE, facts.down.weight_OI, self.width)
        self._keep(facts, kept_E)
        weight_OE, bias_O = fold(known, facts.down.weight_OI, kept_E)
        self.last.weight.copy_(weight_OE)
        self.last.bias.copy_(facts.down.bias_O + bias_O)

    def _fits(self, facts: MLPFacts) -> bool:
        same = facts.activation == self.activation and (facts.gate is not None) == (self.gate is not None)
        shape = (facts.down.weight_OI.shape[0], facts.up.weight_OI.shape[1])
        return same and shape == (self.width_out, self.width_in) and facts.width >= self.width

    def _keep(self, facts: MLPFacts, kept_E: torch.Tensor) -> None:
        pairs = [(self.up, facts.up)]
        if self.gate is not None:
            assert facts.gate is not None  # _fits
            pairs.append((self.gate, facts.gate))
        for linear, affine in pairs:
            linear.weight.copy_(affine.weight_OI[kept_E])
            linear.bias.copy_(affine.bias_O[kept_E])
        self.last.weight.copy_(facts.down.weight_OI[:, kept_E])
        self.last.bias.copy_(facts.down.bias_O)


class NarrowOptions(NarrowHeadsOptions):
    """Width rule: E = `width`, or `ratio` times the guide's neurons; heads = `heads`, or `ratio` times the guide's; of
    convolutions the channels between them, as `narrow-channels` has it, and of a recurrent cell its units.

    `width` is for an MLP, convolutions or a cell, `heads` for an attention (`scope="mixing"`, or name the target
    `narrow-heads`).
    """

    width: int | None = Field(default=None, gt=0)


def _instead(part: PartFacts) -> str:
    """What a part that is no MLP can have."""
    if part.attention is not None:
        return "Set heads or ratio for an attention."
    keep = f"or keep it with {part.keep}."
    if len(part.input_shape) == 4:
        return f"For fewer channels choose target 'bottleneck' or 'resnet-block' with width=, {keep}"
    if part.mixing == "none":  # experts behind a router, say
        return f"Choose target 'mlp' for it alone by parts=[{part.path!r}], name the MLPs inside of it as parts, {keep}"
    return f"Choose target 'mlp' or 'rnn' for it, {keep}"


def check(part: PartFacts, options: NarrowOptions) -> None:
    facts = part.mlp
    if facts is None and part.attention is not None and options.width is None:
        check_heads("narrow", part, options)
        return
    if facts is None and part.cell is not None:
        _check_units(part, part.cell, options)
        return
    if facts is None and part.channels is not None and options.heads is None:
        check_channels("narrow", part, _of_channels(options))
        return
    if facts is None:
        raise part.mismatch(
            "narrow",
            found="an attention, and the option 'width'"
            if part.attention is not None
            else f"{describe(part.input_shape)} -> {describe(part.output_shape)} that is neither",
            expected="an MLP, down(act(up(x))) or down(act(gate(x)) * up(x)), an attention or a recurrent cell",
            advice=_instead(part),
        )
    if options.heads is not None:
        raise part.mismatch(
            "narrow",
            found=f"an MLP of {facts.width} neurons, and the option 'heads'",
            expected="an attention to take heads from",
            advice="Set width or ratio for an MLP; name the attentions, or use target 'narrow-heads', for heads.",
        )
    _check_width(part, options, facts.width, "neurons")


def _check_width(part: PartFacts, options: NarrowOptions, most: int, of: str) -> None:
    if options.width is not None and options.width > most:
        raise part.mismatch(
            "narrow",
            found=f"width {options.width}",
            expected=f"at most the {most} {of} that there are",
            advice="Lower width, or set ratio.",
        )


def _check_units(part: PartFacts, cell: CellFacts, options: NarrowOptions) -> None:
    if options.heads is not None:
        raise part.mismatch(
            "narrow",
            found=f"a recurrent cell of {cell.units} units, and the option 'heads'",
            expected="an attention to take heads from",
            advice="Set width or ratio for a cell.",
        )
    _check_width(part, options, cell.units, "units")


def _of_channels(options: NarrowOptions) -> NarrowChannelsOptions:
    return NarrowChannelsOptions(ratio=options.ratio, width=options.width)


def build(part: PartFacts, options: NarrowOptions) -> TargetModule:
    facts = part.mlp
    if facts is None and part.cell is not None:
        units = options.width or max(1, round(options.ratio * part.cell.units))
        return get_family(part.cell.kind).build(part, WidthOptions(width=units))
    if facts is None and part.channels is not None:
        return get_family("narrow-channels").build(part, _of_channels(options))
    if facts is None:
        return get_family("narrow-heads").build(part, options)
    return NarrowMLP(
        width_in=part.width_in,
        width_out=part.width_out,
        width=options.width or max(1, round(options.ratio * facts.width)),
        activation=facts.activation,
        gated=facts.gate is not None,
    )


TARGET = Family(
    name="narrow",
    summary="the same MLP with fewer neurons, the rest folded in; attention with fewer heads, convolutions with fewer "
    "channels, recurrent cells with fewer units",
    options=NarrowOptions,
    module=NarrowMLP,
    build=build,
    scope="token-wise",
    channels=True,
    units=True,
    check=check,
)
