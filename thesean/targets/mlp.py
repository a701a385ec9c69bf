"""Multilayer perceptrons: flattening ones for feature maps and vectors, token-wise ones for sequences.

Where tokens should hear of each other and not be flattened, a rule picks token-mlp; the saved configuration names it.

B batch, T time, D width, E hidden width, I flattened input, O flattened output
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from pydantic import Field
from torch import nn

from thesean.targets.shared.directions import directions
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options, parse_options
from thesean.targets.shared.module import State, TargetModule
from thesean.targets.shared.norms import ENOUGH, VectorBatchNorm, standardise
from thesean.targets.shared.registry import get_family
from thesean.targets.shared.sequence import SmallLinear, describe
from thesean.targets.shared.shaped import ShapedFrame, ShapedTarget

Activation = Literal["gelu", "relu"]
HiddenNorm = Literal["layer", "batch", "both", "none"]


class MLP(ShapedTarget):
    """y = last(act(norm(first(x)))), on the flattened part or on each token. Stateless: returns y alone.

    `flatten`: x_B... -> (B, I) -> (B, E) -> (B, O) -> (B, ...). Otherwise x_BTD -> y_BTD, the same for every token.
    `rank` writes the first layer as two, I -> rank -> E, with rank (I + E) weights in place of I E.
    """

    family = "mlp"

    def __init__(
        self,
        *,
        width: int,
        flatten: bool,
        rank: int | None = None,
        activation: Activation = "gelu",
        hidden_norm: HiddenNorm = "none",
        norm: bool = False,
        **frame: Unpack[ShapedFrame],
    ) -> None:
        super().__init__(**frame)
        self.width = width
        self.flatten = flatten
        self.rank = rank
        self.activation = activation
        self.hidden_norm = hidden_norm
        size_in, size_out = math.prod(self.input_shape), math.prod(self.output_shape)
        self.norm = nn.LayerNorm(size_in) if norm else None
        first: list[nn.Module] = (
            [nn.Linear(size_in, width)]
            if rank is None
            else [nn.Linear(size_in, rank, bias=False), nn.Linear(rank, width)]
        )
        if hidden_norm in ("layer", "both"):
            first.append(nn.LayerNorm(width))
        if hidden_norm in ("batch", "both"):
            first.append(VectorBatchNorm(width))
        self.first = nn.Sequential(*first, nn.GELU() if activation == "gelu" else nn.ReLU())
        self.last = SmallLinear(width, size_out)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "width": self.width,
            "flatten": self.flatten,
            "rank": self.rank,
            "activation": self.activation,
            "hidden_norm": self.hidden_norm,
            "norm": self.norm is not None,
        }

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        if self.flatten:
            x = x.flatten(1)
        return self.first(x if self.norm is None else self.norm(x)), None

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Where the part is flattened, half of the neurons read the inputs' directions that say most of the output,
        each with both signs: act(u) - act(-u) = u holds what is linear. The others stay random, and bend: with none of
        those, digits end at twice and thrice the loss, and with none of these Fashion-MNIST at 82.1% instead of 82.9%
        (the demo's convnet, two seeds, and the one of benchmarks/results/matrix.json, one).
        """
        if not examples or not self.flatten or self.rank is not None:
            return
        first = self.first[0]
        assert isinstance(first, nn.Linear)
        given = [self.norm(x.flatten(1)) if self.norm is not None else x.flatten(1) for x, _ in examples]
        skips = [self.skip(x) for x, _ in examples]
        wanted = [(y if skip is None else y - skip).flatten(1) for (_, y), skip in zip(examples, skips, strict=True)]
        weight_KI, bias_K = directions(list(zip(given, wanted, strict=True)), self.width // 4, part.path)
        both_EI, both_E = torch.cat([weight_KI, -weight_KI]), torch.cat([bias_K, -bias_K])
        first.weight[: len(both_E)] = both_EI.to(first.weight)  # what is left of the width stays random
        first.bias[: len(both_E)] = both_E.to(first.bias)
        if self.hidden_norm == "both" and sum(len(x_NI) for x_NI in given) >= ENOUGH:
            standardise(first, given)  # for the norm by the batch to begin where it will be

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(1, self.output_shape) if self.flatten else y

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        return (
            2 * part.rows(sizes, 1 if self.flatten else -1) * sum(p.numel() for p in self.parameters() if p.ndim >= 2)
        )


class MLPOptions(Options):
    """Width rule when flattening: min(I, O, 128), at least 32. It is itself the map's rank, which is why a feature
    map of any size gets a small module; `rank` narrows the first layer further. Token-wise: 4 D.

    A sequence is flattened where its tokens see each other; `tokens="each"` applies one MLP to each token instead, as
    for a transformer's whole block, and `mixing` lets it hear of the others: then it is token-mlp's, with its width
    rule, and `rank` and `hidden_norm` are not for it.

    `hidden_norm` defaults to "both" when flattening, a layer norm and behind it one by the batch, and to "none"
    token-wise. The one bounds what inputs that the guide never gave can do, the other trains better
    (benchmarks/results/hidden_norms.json); batches of fewer than 32 rows trust its statistics so far. `residual` adds
    the input where the shapes agree, `norm` puts a LayerNorm in front: both are left out by default, but for
    `tokens="each"` in a part that no stream runs beside.
    """

    tokens: Literal["all", "each"] | None = Field(default=None, description="of a sequence: flattened, or one by one")
    mixing: Literal["none", "mean", "mixer"] = Field(default="none", description="what each token hears of the others")

    width: int | None = Field(default=None, gt=0)
    rank: int | None = Field(default=None, gt=0)
    activation: Activation = "gelu"
    hidden_norm: HiddenNorm | None = None
    residual: bool | None = None
    norm: bool | None = None


def flattens(part: PartFacts, options: MLPOptions) -> bool:
    """Everything but a sequence whose tokens don't see each other, unless the options say otherwise."""
    return options.tokens == "all" if options.tokens else not (part.is_sequence and part.mixing == "none")


def is_whole(part: PartFacts, options: MLPOptions) -> bool:
    """A block of tokens that see each other: its module brings the stream that no one else does."""
    return options.tokens == "each" and part.mixing != "none" and not part.is_branch


def token_mlp(part: PartFacts, options: MLPOptions) -> tuple[Family, Options]:
    """The family that lets tokens hear of each other, with these options."""
    family, given = get_family("token-mlp"), options.model_dump(exclude_none=True, exclude={"tokens"})
    whole = is_whole(part, options)
    return family, parse_options(family, {"residual": whole, "norm": whole, **given})


def check_tokens(part: PartFacts, options: MLPOptions) -> None:
    """Raises TargetMismatchError where `tokens` and `mixing` don't go together, or with the part."""
    if options.tokens == "each" and not part.is_sequence:
        raise part.mismatch(
            "mlp",
            found=f"tokens='each' for {describe(part.input_shape)} -> {describe(part.output_shape)}",
            expected="a sequence (batch, time, width) in and out",
            advice="Leave tokens out: the part is flattened.",
        )
    if options.tokens != "each" and options.mixing != "none":
        raise part.mismatch(
            "mlp",
            found=f"mixing={options.mixing!r} without tokens='each'",
            expected="tokens that are not flattened, for them to hear of each other",
            advice="Set tokens='each', or leave mixing out.",
        )


def check(part: PartFacts, options: MLPOptions) -> None:
    check_tokens(part, options)
    if options.mixing != "none":
        family, given = token_mlp(part, options)
        family.check(part, given)
        return
    shapes = f"{describe(part.input_shape)} -> {describe(part.output_shape)}"
    shared = flattens(part, options)
    dynamic = part.input_shape[1 if shared else 2 :] + part.output_shape[1 if shared else 2 :]
    if part.is_sequence and shared and part.mixing == "causal":
        raise part.mismatch(
            "mlp",
            found="a causal part: no output sees a later token",
            expected="a part whose outputs may see all inputs",
            advice="A flattening MLP would read the future. Choose target 'rnn', or set tokens='each'.",
        )
    if any(isinstance(dim, str) for dim in dynamic):
        raise part.mismatch(
            "mlp",
            found=shapes,
            expected="static dimensions after the batch",
            advice="An MLP of fixed size can't mix an unbounded sequence: choose target 'rnn', or set tokens='each'."
            if part.is_sequence
            else "Trace the guide with fixed sizes: only the batch may be dynamic.",
        )
    if not shared and part.input_shape[:2] != part.output_shape[:2]:
        raise part.mismatch(
            "mlp",
            found=shapes,
            expected="as many tokens out as in",
            advice=f"Keep it with {part.keep} and convert the parts around it.",
        )
    if len(part.input_shape) < 2 or len(part.output_shape) < 2:
        raise part.mismatch(
            "mlp",
            found=shapes,
            expected="a batch and at least one more dimension",
            advice=f"Keep it with {part.keep}.",
        )
    if not shared and options.hidden_norm in ("batch", "both"):
        raise part.mismatch(
            "mlp",
            found=f"hidden_norm={options.hidden_norm!r} for a token-wise part",
            expected="hidden_norm 'layer' or 'none' there",
            advice="Leave hidden_norm out.",
        )


def build(part: PartFacts, options: MLPOptions) -> TargetModule:
    if options.mixing != "none":
        family, given = token_mlp(part, options)
        return family.build(part, given)
    flatten = flattens(part, options)
    whole = is_whole(part, options)
    start = 1 if flatten else 2
    input_shape = [int(dim) for dim in part.input_shape[start:]]
    output_shape = [int(dim) for dim in part.output_shape[start:]]
    if flatten:
        width = options.width or max(32, min(math.prod(input_shape), math.prod(output_shape), 128))
    else:
        width = options.width or 4 * input_shape[0]
    return MLP(
        input_shape=input_shape,
        output_shape=output_shape,
        width=width,
        flatten=flatten,
        rank=options.rank,
        activation=options.activation,
        hidden_norm=options.hidden_norm or ("both" if flatten else "none"),
        residual=whole if options.residual is None else options.residual,
        norm=whole if options.norm is None else options.norm,
    )


TARGET = Family(
    name="mlp",
    summary="flattening MLP for feature maps and vectors, token-wise MLP for sequences",
    options=MLPOptions,
    module=MLP,
    build=build,
    scope="part",
    check=check,
)
