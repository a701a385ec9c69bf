"""The options of linear attention, the shape of its heads, and where they start.

H heads of queries, G heads of keys and values, C width of a head's query and key, W tokens in the window
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Required

from pydantic import Field, PositiveFloat

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Place
from thesean.targets.shared.head_norm import Meeting, NormForm
from thesean.targets.shared.locality import window_errors
from thesean.targets.shared.memory import later
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceOptions,
    check_sequence,
    describe,
    reads_both_ways,
    sequence_frame,
    steps_ahead,
)

# Heads forget over 1/3 token to 64, spread geometrically, and W starts at 1.5 instead of 1. Solved in closed form on
# the demo's guide this beats heads that all remember 90 to 1100 tokens, with W = 1, by far: "fast linear-attention" and
# the same with long memories in benchmarks/results/recipes.json.
MEMORY = (1 / 3, 64.0)
SHARPNESS = 1.5

# Beside a window, heads have the far past to themselves: long memories and sharper features are better there, by
# half as much as a window of twice the width is (benchmarks/results/window.json: 1.510, and 1.523 and 1.528).
WINDOW_MEMORY = (90.0, 1100.0)
WINDOW_SHARPNESS = 2.0

# A guide that turns queries and keys knows distances by nothing else: without a window all of that is lost, 3.3 nats
# where the guide has 1.5 (benchmarks/results/rotary.json). One that adds a bias of distance is no better off.
WINDOW = 64
SINKS = 4

# A window that the guide's attention decides is the smallest of these that leaves at most this share of its output's
# variance out, and no longer than a quarter of the rows: what holds all that the guide looks back on is no recurrence.
WINDOWS = (8, 16, 32, 64, 128)
LEFT_OUT = 0.03
# of the error without them: what sinks must bring it down to
WORTH_SINKS = 0.8


# What taps are of: a step's values, or all that it reads
Tapped = Literal["values", "inputs"]


class HeadsFrame(SequenceFrame, Meeting, total=False):
    sinks: int
    taps: int
    tapped: Tapped
    beside: int


class HeadsArguments(HeadsFrame, total=False):
    """All that the module takes, for one that hands it on."""

    heads: Required[int]
    key_width: Required[int]
    value_width: Required[int]
    kv_heads: int | None
    window: int | None
    scale: float | None
    memory: tuple[float, float]
    sharpness: float


class LinearAttentionOptions(SequenceOptions):
    """Width rule: heads, groups and widths of the guide's attention. Without one, or with options, `heads` heads that
    share `width` features; heads default to one per 32 of the part's width, and width to the part's.

    Defaults: a window of 64 tokens and 4 sinks where the guide turns queries and keys (rotary positions) or adds a bias
    of distance (ALiBi), no window elsewhere; `memory` and `sharpness` 1/3 to 64 tokens and 1.5, beside a window 90 to
    1100 tokens past it and 2.
    """

    heads: int | None = Field(default=None, gt=0)
    kv_heads: int | None = Field(
        default=None, gt=0, description="states and heads of keys and values; the guide's, or as many as heads"
    )
    width: int | None = Field(default=None, gt=0)
    window: int | None = Field(
        default=None, ge=0, description="last tokens that keep the guide's softmax attention; 0: none"
    )
    sinks: int | None = Field(
        default=None, ge=0, description="first tokens that keep it too, beside a window; 4 unless told"
    )
    memory: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="tokens that the first and last head remember"
    )
    sharpness: float | None = Field(default=None, gt=0, description="of copied queries and keys, as a factor on W")
    taps: int = Field(
        default=0, ge=0, description="values of so many last tokens, its own included, as features of their own"
    )


class HeadShape(NamedTuple):
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    scale: float  # of q.k in the window
    rotation: list[list[float]] | None = None  # of q and k there
    norm_eps: list[float] | None = None  # of the norms of q and k
    norm_form: NormForm | None = None
    bias: list[int] | None = None  # distances of its table in the window


def head_shape(part: PartFacts, options: LinearAttentionOptions) -> HeadShape:
    facts = part.attention
    if facts is not None and not _asked(options):
        key_width, value_width = facts.widths
        windowed = window_of(part, options) is not None
        return HeadShape(
            heads=facts.heads,
            kv_heads=options.kv_heads or facts.kv_heads,
            key_width=key_width,
            value_width=value_width,
            scale=facts.scale,
            rotation=facts.rotation.rows() if facts.rotation is not None and windowed else None,
            norm_eps=facts.norm_eps,
            norm_form=facts.norm_form,
            bias=[facts.bias.sizes[0] + steps_ahead(part, options)] if facts.bias is not None and windowed else None,
        )
    width = options.width or part.features_width
    heads = options.heads or (facts.heads if facts is not None else default_heads(width))
    each = width // heads
    return HeadShape(heads, options.kv_heads or heads, each, each, max(each, 1) ** -0.5)


def window_of(part: PartFacts, options: LinearAttentionOptions) -> int | None:
    """Tokens in the window up to the step itself; None for no window."""
    if options.window is not None:
        return options.window or None
    facts = part.attention
    told = facts is not None and (facts.rotation is not None or facts.bias is not None)
    return WINDOW if told and not _asked(options) and not reads_both_ways(part, options) else None


def sinks_of(part: PartFacts, options: LinearAttentionOptions) -> int:
    if window_of(part, options) is None:
        return 0
    return SINKS if options.sinks is None else options.sinks


def start_of(part: PartFacts, options: LinearAttentionOptions) -> tuple[tuple[float, float], float]:
    """memory and sharpness."""
    beside = window_of(part, options) is not None
    memory = options.memory or (WINDOW_MEMORY if beside else MEMORY)
    if not beside:
        memory = later(memory, steps_ahead(part, options))
    return memory, options.sharpness or (WINDOW_SHARPNESS if beside else SHARPNESS)


def decide(places: Sequence[Place], options: LinearAttentionOptions) -> dict[str, Any]:
    """Window and sinks by how near the guide's attention looks, one choice for all places; none where a mean of all
    tokens is as near as any window. Empty where both are given, or nothing can be measured.
    """
    found = [choice for place in places if (choice := _by_locality(place, options)) is not None]
    if not found:
        return {}
    window = max(window for window, _ in found)
    return {"window": window, **({"sinks": max(sinks for _, sinks in found)} if window else {})}


def _by_locality(place: Place, options: LinearAttentionOptions) -> tuple[int, int] | None:
    facts = place.facts.attention
    measured = facts is not None and facts.plain and place.facts.mixing == "causal" and not _asked(options)
    if facts is None or not measured or options.window is not None:
        return None
    x_BTD, mask_BT = place.look()
    length = x_BTD.shape[1] if mask_BT is None else int(mask_BT.sum(1).max())
    windows = [w for w in WINDOWS if w <= length // 4]
    if not windows:
        return None
    sinks = SINKS if options.sinks is None else options.sinks
    errors = window_errors(facts, x_BTD, mask_BT, windows, sinks)
    if not errors:
        return None
    window = next((w for w in windows if errors[w] <= LEFT_OUT), windows[-1])
    if errors[0] <= errors[window]:
        return 0, 0
    if (
        options.sinks is None
        and errors[window] > WORTH_SINKS * window_errors(facts, x_BTD, mask_BT, [window], 0)[window]
    ):
        sinks = 0
    return window, sinks


def heads_frame(part: PartFacts, options: LinearAttentionOptions) -> dict[str, Any]:
    """The arguments of `LinearHeads`."""
    memory, sharpness = start_of(part, options)
    window, shape = window_of(part, options), head_shape(part, options)
    return {
        **shape._asdict(),
        "window": None if window is None else window + steps_ahead(part, options),
        "sinks": sinks_of(part, options),
        "taps": options.taps,
        "tapped": "inputs" if shape.kv_heads * shape.value_width < part.width_in else "values",
        "memory": memory,
        "sharpness": sharpness,
        **sequence_frame(part, options),
    }


def default_heads(width: int) -> int:
    """One head per 32 features, fewer where that doesn't divide the width."""
    heads = max(1, width // 32)
    while width % heads:
        heads -= 1
    return heads


def check(part: PartFacts, options: LinearAttentionOptions, target: str = "linear-attention") -> None:
    """Raises TargetMismatchError for a part, or for options, that linear attention can't be built for."""
    check_sequence(target, part)
    if options.window and reads_both_ways(part, options):
        raise part.mismatch(
            target,
            found=f"window={options.window} for a part that reads both ways",
            expected="a causal part for a window, which holds the last tokens and passes the older ones on to a state",
            advice="Leave window= out, as bidirectional linear attention reads all tokens alike; or set causal=True.",
        )
    if options.sinks and window_of(part, options) is None:
        raise part.mismatch(
            target,
            found=f"sinks={options.sinks} without a window",
            expected="a window beside them, as sinks are tokens that have left one",
            advice="Set window=64, or leave sinks= out.",
        )
    width = options.width or part.features_width
    heads, kv_heads, *_ = head_shape(part, options)
    if _asked(options) and width % heads:
        raise part.mismatch(
            target,
            found=f"width {width} with {heads} heads for {describe(part.input_shape)}",
            expected="a width that the heads divide",
            advice=f"Set heads={default_heads(width)}, or another width.",
        )
    if heads % kv_heads:
        nearest = next(n for n in range(min(kv_heads, heads), 0, -1) if heads % n == 0)
        raise part.mismatch(
            target,
            found=f"kv_heads={kv_heads} with {heads} heads",
            expected="as many heads of queries for each head of keys and values",
            advice=f"Set kv_heads={nearest}, or leave it out.",
        )


def _asked(options: LinearAttentionOptions) -> bool:
    """Whether heads or width are the caller's, not the guide's."""
    return options.heads is not None or options.width is not None
