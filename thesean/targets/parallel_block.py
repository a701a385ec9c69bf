"""A whole transformer block as one recurrence: heads, late values and neurons side by side, one solved layer, one sum.

Attention and MLP in a row are two steps of the stream. Here both read the block's own input, as in the blocks of GPT-J
(Wang and Komatsuzaki 2021) and PaLM (Chowdhery et al. 2022, section 2), so that a block is one norm, one product of
matrices, a recurrence and a second product. What the MLP no longer hears of the attention it hears of the taps: they
tell what the attention's output would have been as far as the last tokens decide it. Solved alone, the demo's guide of
1.448 nats becomes 1.58 that way, and 1.79 without.

B batch, T time, D width of the part, V values a step, E neurons, W neurons of the guide, P taps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from pydantic import Field
from torch import nn

from thesean.errors import NumericalError
from thesean.targets.shared.activations import ACTIVATIONS
from thesean.targets.shared.facts import AttentionFacts, BlockFacts, MLPFacts, NormFacts, PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.head_norm import RmsNorm
from thesean.targets.shared.heads import HeadsArguments, LinearAttentionOptions, heads_frame
from thesean.targets.shared.heads import check as check_heads
from thesean.targets.shared.linear_heads import LinearHeads
from thesean.targets.shared.lookahead import Late
from thesean.targets.shared.module import State
from thesean.targets.shared.select_features import fold, moments, select_features
from thesean.targets.shared.steps import Steps

NormKind = Literal["layer", "rms"]

# Tokens that are looked at, for each feature to choose by and for each late value to hear of.
TOKENS_PER_NEURON = 4
TOKENS_PER_VALUE = 32

# Of the features' mean variance, where neurons are weighed; the closed form has its own.
RIDGE = 1e-3


class ParallelBlock(LinearHeads):
    """y = x + last([heads(n) | taps(n) | act(up(m))]), n = norm(x), m = n + heard(taps); gated act(gate(m)) * up(m).

    x_BTD, state -> (y_BTD, state): that of the heads, and the last P - 1 values, or of n where values are narrower, for
    the taps. Where the guide norms after its sums the stream is normed already: with `inner` the neurons alone read
    norm(x), as its MLP reads a norm of the stream, and heads and taps read x. Norms have a weight to train; the guide's
    own is in the projections.
    """

    family = "parallel-block"
    saved = (*LinearHeads.saved, "hidden", "activation", "gated", "norm_kind", "stream_eps", "inner", "hears")

    def __init__(
        self,
        *,
        hidden: int,
        activation: str = "gelu",
        gated: bool = False,
        norm_kind: NormKind = "layer",
        stream_eps: float = 1e-5,
        inner: bool = False,
        hears: bool = True,
        **frame: Unpack[HeadsArguments],
    ) -> None:
        """Raises ValueError for an activation that is not one of `ACTIVATIONS`."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        frame["beside"] = hidden
        super().__init__(**frame)
        self.hidden, self.activation, self.gated = hidden, activation, gated
        self.norm_kind, self.stream_eps, self.inner = norm_kind, float(stream_eps), inner
        if self.norm is not None:
            self.norm = _norm(norm_kind, self.width_in, self.stream_eps)
        self.inner_norm = _norm(norm_kind, self.width_in, self.stream_eps) if inner and hidden else None
        self.up = nn.Linear(self.width_in, hidden) if hidden else None
        self.gate = nn.Linear(self.width_in, hidden) if hidden and gated else None
        self.hears = hears and hidden > 0 and self.taps is not None
        late = self.mixed_width - heads_width(self)
        self.heard = nn.Linear(late, self.width_in) if self.hears else None
        if self.heard is not None:
            nn.init.zeros_(self.heard.weight)  # until something is known of what there is to hear
            nn.init.zeros_(self.heard.bias)

    def mix(
        self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, State | None]:
        own_BTD = x_BTD if late is None else late(x_BTD)
        mixed_BTE, state = self.attend(x_BTD, own_BTD, state, steps)
        if self.up is None:
            return mixed_BTE, state
        act, read_BTD = ACTIVATIONS[self.activation], self._read_with(mixed_BTE, own_BTD)
        up_BTE = self.up(read_BTD)
        neurons_BTE = act(up_BTE) if self.gate is None else act(self.gate(read_BTD)) * up_BTE
        return torch.cat([mixed_BTE, neurons_BTE], -1), state

    def read(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What the neurons read of their own step."""
        return x_BTD if self.inner_norm is None else self.inner_norm(x_BTD)

    def _read_with(self, mixed_BTE: torch.Tensor, own_BTD: torch.Tensor) -> torch.Tensor:
        """And what they hear of the late values."""
        read_BTD = self.read(own_BTD)
        return read_BTD if self.heard is None else read_BTD + self.heard(mixed_BTE[..., heads_width(self) :])

    def attention_of(self, part: PartFacts) -> AttentionFacts | None:
        return part.attention if part.block is None else part.block.attention

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Projections and neurons, with the norms' weights and biases in them; of fewer neurons than the guide's those
        whose weights' norms multiply to the most.
        """
        block, facts = part.block, self.attention_of(part)
        if facts is None:
            return ()
        copied = self.copy_heads(facts, None if block is None else self._folded(block.attention_norm))
        if block is None or not self._fits(block):
            return copied
        score_W = block.mlp.up.weight_OI.norm(dim=1) * block.mlp.down.weight_OI.norm(dim=0)
        if block.mlp.gate is not None:
            score_W = score_W * block.mlp.gate.weight_OI.norm(dim=1)
        self._keep(block, score_W.topk(self.hidden).indices.sort().values)
        return (*copied, "up", "down") if self.gate is None else (*copied, "up", "gate", "down")

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Balance a window, have the neurons hear of the late values what tells of the stream that the guide's MLP
        reads, and choose among the guide's by what they add to its output.

        Raises NumericalError where the activations are not finite.
        """
        super().prepare(part, examples)
        block = part.block
        if block is None or not self._fits(block) or not examples:
            return
        try:
            if self.heard is not None and block.in_a_row and block.attention.plain:
                self._hear(block, [x_BTD for x_BTD, _ in examples], part.mixing != "bidirectional", self.heard)
            if self.hidden < block.mlp.width:
                self._choose(block, examples)
        except ValueError as error:
            raise NumericalError(f"{part.path}: can't fit its neurons, {error}. Look for NaN in the data.") from error

    def _choose(self, block: BlockFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Those of the guide's neurons that do most for the part's output, beside heads and taps. Raises ValueError
        where the activations are not finite.
        """
        mlp, size = self._folded_mlp(block), self.mixed_width

        def rows(x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
            mixed_BTE = self.features(x_BTD)[0][..., :size]
            skipped = self.skip(x_BTD)
            wanted_BTO = y_BTD if skipped is None else y_BTD - skipped
            hidden_BTW = mlp.hidden(self._read_with(mixed_BTE, x_BTD if self.norm is None else self.norm(x_BTD)))
            return torch.cat([mixed_BTE, hidden_BTW, wanted_BTO], -1).flatten(0, 1)

        stride = _stride([x_BTD for x_BTD, _ in examples], TOKENS_PER_NEURON * (size + mlp.width))
        known = moments(rows(x_BTD, y_BTD)[::stride] for x_BTD, y_BTD in examples).covariance_EE
        own_EE, wanted_EO = known[: -self.width_out].split((size + mlp.width, self.width_out), 1)
        own_EE = own_EE.clone()
        own_EE.diagonal().add_(RIDGE * own_EE.diagonal().mean().clamp_min(1e-12))
        weight_EO = torch.linalg.solve(own_EE, wanted_EO)
        # what heads and taps explain of the neurons is no reason to keep one
        explained_SW = torch.linalg.solve(own_EE[:size, :size], own_EE[:size, size:])
        rest_WW = own_EE[size:, size:] - own_EE[size:, :size] @ explained_SW
        self._keep(block, select_features(rest_WW, weight_EO[size:].T, self.hidden))

    def _hear(self, block: BlockFacts, inputs: Sequence[torch.Tensor], causal: bool, heard: nn.Linear) -> None:
        """Ridge regression of what the guide's MLP reads, less what is read here. Raises ValueError as above."""
        size, norm = heard.in_features, self._norm_of_neurons(block)
        norm = block.mlp_norm if norm is None else norm.bare  # what the projections have taken in is not read

        def rows(x_BTD: torch.Tensor) -> torch.Tensor:
            stream_BTD = block.between(x_BTD, causal)
            own_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
            wanted_BTD = stream_BTD if norm is None else norm.of(stream_BTD)
            return torch.cat([self.late(own_BTD), wanted_BTD - self.read(own_BTD)], -1).flatten(0, 1)

        stride = _stride(inputs, TOKENS_PER_VALUE * size)
        known = moments(rows(x_BTD)[::stride] for x_BTD in inputs)
        eye_DD = torch.eye(self.width_in).to(known.covariance_EE)
        missing_DE = torch.cat([eye_DD.new_zeros(self.width_in, size), eye_DD], 1)
        weight_DV, bias_D = fold(known, missing_DE, torch.arange(size, device=eye_DD.device))
        heard.weight.copy_(weight_DV)
        heard.bias.copy_(bias_D)

    def _norm_of_neurons(self, block: BlockFacts) -> NormFacts | None:
        """That whose weight and bias they take in."""
        return block.mlp_norm if self.norm is not None or self.inner else None

    def _folded(self, norm: NormFacts | None) -> NormFacts | None:
        """The norm whose weights the projections take in; a module that norms nothing takes in none."""
        return norm if self.norm is not None else None

    def _folded_mlp(self, block: BlockFacts) -> MLPFacts:
        """The guide's, as it is where its norm's weight and bias are taken in."""
        mlp, norm = block.mlp, self._norm_of_neurons(block)
        if norm is None:
            return mlp
        return replace(mlp, up=norm.fold(mlp.up), gate=None if mlp.gate is None else norm.fold(mlp.gate))

    def _fits(self, block: BlockFacts) -> bool:
        """Whether there are neurons of the guide's kind here, and no more than it has."""
        same = block.mlp.activation == self.activation and (block.mlp.gate is not None) == self.gated
        shapes = block.mlp.down.weight_OI.shape[0], block.mlp.up.weight_OI.shape[1]
        return (
            self.up is not None
            and same
            and shapes == (self.width_out, self.width_in)
            and self.hidden <= block.mlp.width
        )

    def _keep(self, block: BlockFacts, kept_E: torch.Tensor) -> None:
        mlp = self._folded_mlp(block)
        for linear, affine in ((self.up, mlp.up), (self.gate, mlp.gate)):
            if linear is not None and affine is not None:
                linear.weight.copy_(affine.weight_OI[kept_E])
                linear.bias.copy_(affine.bias_O[kept_E])
        self.last.weight[:, self.mixed_width :].copy_(block.mlp.down.weight_OI[:, kept_E])
        self.last.bias.copy_(block.attention.output.bias_O + block.mlp.down.bias_O)

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        neurons = sum(linear.weight.numel() for linear in (self.up, self.gate, self.heard) if linear is not None)
        return super().flops(part, sizes) + 2 * part.rows(sizes) * neurons


def heads_width(module: LinearHeads) -> int:
    """Features of the means, which come first."""
    return module.heads * module.value_width


def _stride(inputs: Sequence[torch.Tensor], wanted: int) -> int:
    """Every how manieth token is looked at."""
    return math.ceil(sum(math.prod(x_BTD.shape[:2]) for x_BTD in inputs) / wanted)


def _norm(kind: NormKind, width: int, eps: float) -> nn.Module:
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else RmsNorm(width, eps)


class ParallelBlockOptions(LinearAttentionOptions):
    """Width rule: the guide's heads and as many neurons as its MLP has; elsewhere heads as linear attention has them,
    and four neurons for each of the part's features.

    Fewer neurons than the guide's are chosen as `narrow` chooses them, by what they add to heads and taps. `norm` is
    the guide's own kind, a LayerNorm where it has none to tell. Options of the heads, `window` among them, are those of
    linear attention.
    """

    residual: bool = True
    norm: bool = True
    taps: int = Field(
        default=4, ge=0, description="values of so many last tokens, its own included, as features of their own"
    )
    hidden: int | None = Field(default=None, ge=0, description="neurons; the guide's, 0 for none")
    hears: bool = Field(default=True, description="neurons read the late values too")


def as_attention(part: PartFacts) -> PartFacts:
    """The part as the heads see it."""
    return part if part.block is None else replace(part, attention=part.block.attention)


def check(part: PartFacts, options: ParallelBlockOptions) -> None:
    check_heads(as_attention(part), options, target="parallel-block")
    if part.is_branch:
        raise part.mismatch(
            "parallel-block",
            found="a branch beside a residual stream",
            expected="a whole block, of which it brings the sum itself",
            advice="Leave granularity= out, or choose target 'rnn' for an attention and 'narrow' for an MLP.",
        )
    block = part.block
    if block is not None and options.hidden is not None and options.hidden > block.mlp.width:
        raise part.mismatch(
            "parallel-block",
            found=f"hidden={options.hidden}",
            expected=f"at most the {block.mlp.width} neurons that there are",
            advice="Lower hidden, or leave it out.",
        )


def build(part: PartFacts, options: ParallelBlockOptions) -> ParallelBlock:
    given: dict[str, Any] = heads_frame(as_attention(part), options)
    block = part.block
    if block is None:
        hidden = 4 * part.width_in if options.hidden is None else options.hidden
        return ParallelBlock(hidden=hidden, hears=options.hears, **given)
    first, second = block.attention_norm, block.mlp_norm
    read = second if first is None else first
    after_sums = first is None and second is not None
    return ParallelBlock(
        hidden=block.mlp.width if options.hidden is None else options.hidden,
        activation=block.mlp.activation,
        gated=block.mlp.gate is not None,
        norm_kind="layer" if read is None or read.centred else "rms",
        stream_eps=1e-5 if read is None else read.eps,
        inner=after_sums and options.norm,
        hears=options.hears,
        **{**given, "norm": options.norm and first is not None},
    )


TARGET = Family(
    name="parallel-block",
    summary="a whole block in one: linear heads, late values and MLP neurons side by side, one solved layer",
    options=ParallelBlockOptions,
    module=ParallelBlock,
    build=build,
    scope="part",
    block=True,
    check=check,
)
