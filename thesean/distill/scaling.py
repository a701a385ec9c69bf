"""What a run on several ranks costs each of them: bytes held, bytes given to the others, floating-point operations.

Every rank has its share of a batch, and the whole of guide and hybrid, or slices of them while it takes steps. Parts
that are aligned independently are spread over ranks, where there are enough of them and nothing lies in slices. The
formulas count what thesean/ranks.py sends and what a step of thesean/distill/train.py holds; tests hold them against
runs: tests/distill/test_scaling.py, tests/test_ranks.py. docs/scaling.md is made of them.

E features that a part's last layer reads, O its outputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from thesean.distill.seen import MAX_EXAMPLES
from thesean.passes.graph.walk import HELD_BYTES
from thesean.recipe import Alignment

_DOUBLE, _SINGLE = 8, 4

# Of a transformer block's input, what its backward keeps with an attention that keeps no scores: Korthikanti et al.
# 2022 (arXiv 2205.05198), eq. 1 without dropout: 34 bytes a token and width in half precision, of which 2 are masks'.
_KEPT_VALUES = 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A guide whose `parts`, all alike, are replaced."""

    guide: int  # parameters
    parts: int
    replaced: int  # parameters of the guide in one part
    replacement: int  # and of what takes its place
    features: int  # E
    outputs: int  # O
    width: int  # of the exits
    vocabulary: int  # values of the guide's output, a token
    itemsize: int = 2  # bytes of a weight or an activation

    @property
    def hybrid(self) -> int:
        """Parameters."""
        return self.guide + self.parts * (self.replacement - self.replaced)

    @property
    def new(self) -> int:
        """Parameters of all replacements."""
        return self.parts * self.replacement


def statistics_given(sizes: Sizes) -> int:
    """Bytes that a rank gives to solve every part once: count, means, Gram matrix and cross terms of what is fitted and
    of what is held out, in double (closed_form.py).
    """
    e, o = sizes.features, sizes.outputs
    return sizes.parts * 2 * _DOUBLE * (1 + e + o + e * e + e * o)


def gradients_given(sizes: Sizes, trained: int) -> int:
    """Bytes a step, of so many trained parameters: half precision's are added up in float32 (masters.py)."""
    return trained * max(sizes.itemsize, _SINGLE)


def exits_given(sizes: Sizes, tokens: int, ranks: int = 1) -> int:
    """Bytes a step, of a rank's own tokens: hybrid's and guide's activations at all exits, of the examples that a
    similarity is computed on.
    """
    every = -(-tokens * ranks // MAX_EXAMPLES)
    return 2 * sizes.parts * -(-tokens // every) * sizes.width * sizes.itemsize


def ends_given(sizes: Sizes, tokens: int, parts: int) -> int:
    """Bytes a step, of so many tokens: the guide's activations where these parts begin and end, which go to the ranks
    that have them (spread.py); less where one part ends as the next begins.
    """
    return 2 * parts * tokens * sizes.width * sizes.itemsize


def results_given(sizes: Sizes, parts: int) -> int:
    """Bytes each time that spread parts are judged together, of a rank's own parts, without buffers."""
    return parts * sizes.replacement * sizes.itemsize


def outputs_given(sizes: Sizes, tokens: int) -> int:
    """Bytes a step with a loss of the user's own, which is computed on the hybrid's output for all rows. Divergences of
    classes and Thesean's own losses are sums over rows: of those a number is sent.
    """
    return tokens * sizes.vocabulary * sizes.itemsize


def statistics_held(sizes: Sizes) -> int:
    """Bytes of one part's statistics, as they are added up."""
    return statistics_given(sizes) // sizes.parts


def states_held(sizes: Sizes, trained: int) -> int:
    """Bytes that an optimizer holds beside so many weights: gradients, two moments, and float32 masters of weights of
    half precision.
    """
    single = max(sizes.itemsize, _SINGLE)
    return trained * (3 * single + (_SINGLE if sizes.itemsize < _SINGLE else 0))


def weights_held(sizes: Sizes, ranks: int, sharded: bool = False) -> int:
    """Bytes of guide and hybrid in a step: whole, or slices of both and the region under way, about a part's share."""
    both = sizes.itemsize * (sizes.guide + sizes.hybrid)
    region = sizes.itemsize * -(-max(sizes.guide, sizes.hybrid) // sizes.parts)
    return min(both, -(-both // ranks) + region) if sharded else both


def weights_given(sizes: Sizes, ranks: int) -> int:
    """Bytes a step where weights lie in slices, about: a rank's own of the guide's for its forward, of the hybrid's for
    forward and backward.
    """
    return sizes.itemsize * (sizes.guide + 2 * sizes.hybrid) // ranks


def activations_held(sizes: Sizes, tokens: int, recomputed: bool = False) -> int:
    """Bytes that the backward of a step keeps at once of a rank's own tokens, about; blocks as a transformer's. With
    activation checkpointing the stream between regions, and one of them, as long as is best: see passes/graph/cuts.py.
    """
    stream = tokens * sizes.width * sizes.itemsize
    regions = range(1, sizes.parts + 1) if recomputed else (1,)
    return min((n - 1) * stream + _KEPT_VALUES * -(-sizes.parts // n) * stream for n in regions)


def solving_flops(sizes: Sizes, tokens: int) -> float:
    """Of one pass through guide and hybrid over all ranks' tokens, and the Gram matrices."""
    e, o = sizes.features, sizes.outputs
    return 2.0 * tokens * (sizes.guide + sizes.hybrid + sizes.parts * (e * e + e * o))


def solution_flops(sizes: Sizes) -> float:
    """Of the systems of equations, which each rank solves by itself: three ridges are tried and one is taken."""
    e, o = sizes.features, sizes.outputs
    return sizes.parts * 4 * (2 / 3 * e**3 + 2.0 * e * e * o)


def step_flops(trained: int, tokens: int, recomputed: bool = False) -> float:
    """Of a step over so many tokens: forward and backward of what is trained (2 and 4 a weight and token, Kaplan et al.
    2020, arXiv 2001.08361), with activation checkpointing its forward once more. The guide's forward is `guide_flops`.
    """
    return tokens * (8.0 if recomputed else 6.0) * trained


def guide_flops(sizes: Sizes, tokens: int) -> float:
    """Of its forward."""
    return tokens * 2.0 * sizes.guide


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Of each rank, and of what is between them; bytes a second each way."""

    memory: float = 80e9
    flops: float = 0.4 * 989e12  # dense bf16 of an H100 SXM by its data sheet, of which 40% are reached
    double: float = 0.5 * 67e12  # and in double, for the systems of equations
    near: int = 8  # ranks that stand together
    within: float = 0.7 * 450e9  # NVLink
    between: float = 0.7 * 50e9  # an adapter of 400 Gbit/s each

    def link(self, ranks: int) -> float:
        return self.within if ranks <= self.near else self.between


@dataclass(frozen=True, kw_only=True)
class Job:
    """Tokens of a batch, all ranks'; steps of each stage; batches that the closed form is solved on; whether
    activations are computed anew, and weights lie in slices, which is with the former.
    """

    tokens: int
    steps: int
    batches: int
    recomputed: bool = False
    sharded: bool = False


class Stage(NamedTuple):
    """For each rank: bytes held at once, and of the whole stage bytes received and seconds."""

    name: str
    memory: float
    traffic: float
    seconds: float


def stages_of(sizes: Sizes, job: Job, hardware: Hardware, ranks: int) -> list[Stage]:
    """Closed form, alignment of all parts independently, and fine-tuning with a loss of Thesean's or none."""
    own, others = job.tokens // ranks, ranks - 1
    guide, hybrid, new = (sizes.itemsize * n for n in (sizes.guide, sizes.hybrid, sizes.new))

    def reduced(given: float) -> float:
        """A ring hands all of it on twice, but for a rank's own share."""
        return 2 * given * others / ranks

    solving = guide + new + max(HELD_BYTES, guide // 4) + 3 * statistics_held(sizes)
    sent = reduced(statistics_given(sizes))
    seconds = solving_flops(sizes, job.batches * job.tokens) / ranks / hardware.flops
    seconds += solution_flops(sizes) / hardware.double + sent / hardware.link(ranks)
    found = [Stage("closed form", solving, sent, seconds)]
    for name, trained, copies in (
        ("alignment", sizes.new, 3 * new),  # the best state, one to go back to, the snapshots
        ("fine-tuning", sizes.hybrid, 2 * hybrid),  # the best state by a sample, and by all
    ):
        step = _spread if name == "alignment" and not job.sharded and 1 < ranks <= sizes.parts else _on_rows
        outputs = own * sizes.vocabulary * sizes.itemsize if name == "fine-tuning" else 0
        states, kept, sent, flops = step(sizes, job, trained, ranks)
        held = weights_held(sizes, ranks, job.sharded) + kept
        held += 4 * outputs  # the hybrid's and the guide's, their logarithms or gradients
        held = copies + states + max(held, guide + hybrid)  # which are whole where a state is judged
        seconds = (guide_flops(sizes, own) + flops) / hardware.flops + sent / hardware.link(ranks)
        found.append(Stage(name, held, job.steps * sent, job.steps * seconds))
    return found


def _on_rows(sizes: Sizes, job: Job, trained: int, ranks: int) -> tuple[float, float, float, float]:
    """Of a step: bytes of an optimizer, of activations, received ones too, of all that is received, and operations; all
    of what is trained, on a rank's own rows.
    """
    own, others = job.tokens // ranks, ranks - 1
    exits = exits_given(sizes, own, ranks)
    states = states_held(sizes, trained) // (ranks if job.sharded else 1)
    summed = gradients_given(sizes, trained) * others / ranks
    sent = others * exits + (2 * summed if not job.sharded else summed + others * weights_given(sizes, ranks))
    kept = activations_held(sizes, own, job.recomputed) + (ranks * exits if others else 0)
    return states, kept, sent, step_flops(trained, own, job.recomputed)


def _spread(sizes: Sizes, job: Job, trained: int, ranks: int) -> tuple[float, float, float, float]:
    """The same of the rank with most parts, on all rows."""
    parts, own = -(-sizes.parts // ranks), job.tokens // ranks
    weights = trained * parts // sizes.parts
    results = results_given(sizes, sizes.parts - parts) / Alignment().check_every
    sent = ends_given(sizes, job.tokens - own, parts) + results
    kept = activations_held(sizes, job.tokens * parts // sizes.parts, job.recomputed)
    kept += ends_given(sizes, job.tokens, parts)
    return states_held(sizes, weights), kept, sent, step_flops(weights, job.tokens, job.recomputed)
