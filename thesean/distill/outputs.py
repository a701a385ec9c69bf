"""What a guide's outputs are, and how far a hybrid's are from them: each by its own measure.

B batch, T time, V classes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.nn import functional as F

from thesean import exchange
from thesean.errors import DataError, NumericalError, unknown_name
from thesean.kernels.shared.precision import widen
from thesean.recipe import Divergence

OutputKind = Literal["softmax", "sigmoid", "mse", "ignore"]
Leaf = TypeVar("Leaf")

# Of the largest value: an output that moves by less from example to example is a constant
_STILL = 1e-6

# What rules a class out in place of -inf is as low as this: float16 has no lower round one
_MASKED = -1e4

# Numbers that are looked at together: with a vocabulary of 50,000 each copy of the logits would weigh as much as layers
_PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """`kinds` by name, as an exported file names its outputs; `told` says how each is compared, for people.

    `variances`, by name, are of the numbers that are compared by squared error: a batch of one row has none of its own.
    """

    kinds: Mapping[str, OutputKind]
    told: str = ""
    classes: int = 0  # of the widest softmax
    variances: Mapping[str, float] = field(default_factory=dict)

    @property
    def of_classes(self) -> bool:
        """Whether distances are over classes alone, one of which is right."""
        return {k for k in self.kinds.values() if k != "ignore"} == {"softmax"}

    @property
    def of_numbers(self) -> bool:
        """Whether distances are squared errors in units of the variance alone."""
        return {k for k in self.kinds.values() if k != "ignore"} == {"mse"}

    @property
    def in_nats(self) -> bool:
        """Whether distances are Kullback-Leibler divergences alone."""
        return {k for k in self.kinds.values() if k != "ignore"} <= {"softmax", "sigmoid"}

    def check_finite(self, output: Any, where: str) -> None:
        """Raises NumericalError for NaN and infinities that mean nothing: a class at -inf is ruled out."""
        for name, value in named_outputs(output).items():
            kind = self.kinds.get(name, "ignore")
            bad = ~value.isfinite() if kind != "softmax" else value.isnan() | (value == torch.inf)
            if kind != "ignore" and bool(bad.any()):
                raise NumericalError(
                    f"{where}: the guide's own output {name!r} holds NaN or infinity. Look for NaN in the data, or in "
                    "the guide's weights."
                )

    def distance(
        self,
        output: Any,
        guide: Any,
        temperature: float = 1.0,
        masks: Mapping[str, torch.Tensor] | None = None,
        by: Divergence = "kl",
    ) -> torch.Tensor:
        """The mean over the outputs that count; 0 for equal ones. Temperature and divergence are those of softmax and
        sigmoid alone, which are multiplied by the temperature's square (Hinton et al. 2015). `masks`: (B, T) booleans
        by name, True where an output's step counts. Of several ranks each has its own rows of classes, and all of what
        is compared by the squared error.
        """
        own, theirs = named_outputs(output), named_outputs(guide)
        terms = []
        for name, kind in self.kinds.items():
            if kind == "ignore":
                continue
            y, g, mask_BT = own[name], theirs[name], (masks or {}).get(name)
            if kind != "softmax":  # that one widens piece by piece
                y, g = widen(y, g)
            if kind == "mse":
                terms.append(_squared_distance(y, g, mask_BT, self.variances.get(name)))
                continue
            if mask_BT is not None and kind == "softmax" and g.ndim == 2:  # over the steps, as where an answer begins
                g = g.masked_fill(~mask_BT, -torch.inf)
            elif mask_BT is not None:
                y, g = y[mask_BT], g[mask_BT]
            by_kind = _softmax_distance if kind == "softmax" else _sigmoid_distance
            terms.append(by_kind(y, g, temperature, by))
        return torch.stack(terms).mean()


def named_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of an output: the guide's own keys, nested ones joined by "."; "output" or "output_0",
    "output_1"... without keys.
    """
    return {name: value for name, value in named_leaves(output, torch.Tensor).items() if value.is_floating_point()}


def named_leaves(output: Any, kind: type[Leaf]) -> dict[str, Leaf]:
    """The leaves of this kind in a nested output, by the names of `named_outputs`."""
    return dict(_leaves(output, "", kind))


def _leaves(value: Any, prefix: str, kind: type[Leaf]) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, kind):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key), kind)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}.{index}" if prefix else f"output_{index}", kind)


def read_outputs(
    observed: Sequence[Any], labels: Sequence[torch.Tensor] = (), given: Mapping[str, OutputKind] | None = None
) -> Outputs:
    """What each output is, by what the guide gave on inputs that differ, and by the labels of the first. All are of one
    shape, but later ones may be of the first rows alone.

    Several values a row are logits by softmax where called so, where integer labels have their shape, and where
    they are the logarithms of probabilities; logits by sigmoid where labels of 0 and 1 have it. What doesn't vary is
    ignored, and all else compared by the normalised MSE.
    `given` overrules, by name. Raises DataError for a name that isn't there, or where nothing is left to match;
    UnknownNameError for a kind that isn't.
    """
    found = [named_outputs(output) for output in observed]
    for name, kind in (given or {}).items():
        if name not in found[0]:
            raise DataError(f"outputs: the guide gives no {name!r}; it gives: {', '.join(found[0]) or 'none'}.")
        if kind not in get_args(OutputKind):
            raise unknown_name("kind of output", kind, get_args(OutputKind))
    kinds: dict[str, OutputKind] = {}
    told = []
    main = next((n for n, v in found[0].items() if v.ndim), None)  # labels are of the first one
    for name in found[0]:
        values = [f[name] for f in found]
        guessed, why = _kind(name, values, labels if name == main else ())
        kinds[name] = (given or {}).get(name, guessed)
        told.append(_describe(name, kinds[name], values[0], why if kinds[name] == guessed else "asked for"))
    if given is None and all(kind == "ignore" for kind in kinds.values()):
        # on these inputs nothing varies: better to match all of it than to refuse a guide that may vary on others
        kinds = {name: "mse" for name in kinds if found[0][name].ndim}
        told = [_describe(name, "mse", found[0][name], "it didn't vary") for name in kinds]
    if not any(kind != "ignore" for kind in kinds.values()):
        raise DataError(
            "the guide's output holds no floating-point tensor with a batch that is to count; there is nothing to "
            "match."
        )
    widths = [found[0][name].shape[-1] for name, kind in kinds.items() if kind == "softmax"]
    variances = {n: _variance([f[n] for f in found]) for n, kind in kinds.items() if kind == "mse"}
    return Outputs(
        kinds=kinds, told="outputs: " + "; ".join(told), classes=max(widths, default=0),
        variances={name: v for name, v in variances.items() if v},
    )  # fmt: skip


def _kind(name: str, values: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> tuple[OutputKind, str]:
    value = values[0]
    if value.ndim == 0:
        return "ignore", "one number for a whole batch"
    several = value.ndim > 1 and value.shape[-1] > 1
    masked = several and _rules_out(value)
    if _is_constant([v.masked_fill(v <= value.min() / 2, -torch.inf) for v in values] if masked else values):
        return "ignore", "constant"
    if several and (name.rpartition(".")[2].endswith("logits") or masked):
        return "softmax", ""
    if several and all(map(_are_log_probabilities, values)):
        return "softmax", "log probabilities"
    for label in labels:
        if several and not label.is_floating_point() and label.shape == value.shape[:-1]:
            return "softmax", ""
        if label.shape == value.shape and bool(((label == 0) | (label == 1)).all()):
            return "sigmoid", ""
    return "mse", ""


def _are_log_probabilities(value: torch.Tensor) -> bool:
    """Whether every row is the logarithm of numbers that sum to one, as far as the dtype tells that."""
    if not value.numel() or not bool((value <= 0).all()):
        return False
    # rounding moves each term, and the sum by their mean at most, which entropy bounds
    rounding = torch.finfo(value.dtype).eps * (1 + math.log(value.shape[-1]))
    pieces = value.flatten(0, -2).split(max(1, _PIECE // value.shape[-1]))
    return all(bool((p.double().logsumexp(-1).abs() <= max(rounding, 1e-5)).all()) for p in pieces)


def _rules_out(value: torch.Tensor) -> bool:
    """Whether some classes are masked: by -inf, or by a number so large that it stands for it, -1e9 or the least there
    is. Nothing but logits does that.
    """
    if bool((value == -torch.inf).any()):
        return True
    least = value.min()
    if not bool(least.isfinite()) or least > _MASKED:
        return False
    out = value <= least / 2
    others = value[~out]
    if not others.numel() or others.abs().max() > -least / 100:
        return False
    out_NV = out.flatten(0, -2)
    return bool((value[out] == least).all()) or bool((out_NV != out_NV[:1]).any())  # else a column of another scale


def _variance(values: Sequence[torch.Tensor]) -> float:
    """Of a number from row to row, or from step to step where there is one row, or lengths differ; 0 of one number."""
    rows = [v.float().nan_to_num(posinf=0.0, neginf=0.0) for v in values if v.ndim]
    if len({v.shape[1:] for v in rows}) > 1 or sum(map(len, rows)) < 2:
        rows = [v.flatten(0, -2) for v in rows if v.ndim > 1]
    if len({v.shape[1:] for v in rows}) != 1:
        return 0.0
    return float(torch.cat(rows).var(0, correction=0).mean())


def _is_constant(values: Sequence[torch.Tensor]) -> bool:
    """The same tensor whatever the inputs hold; of one run alone nothing can be said."""
    if len(values) < 2 or any(v.shape[1:] != values[0].shape[1:] or not v.ndim for v in values):
        return False
    rows = min(len(v) for v in values)
    values = [v[:rows] for v in values]
    first = values[0].reshape(-1)
    pieces = [slice(at, at + _PIECE) for at in range(0, max(1, first.numel()), _PIECE)]
    most = _STILL * max(1e-30, *(_largest(first[at]) for at in pieces))
    others = [v.reshape(-1) for v in values[1:]]
    return all(bool(torch.nan_to_num(v[at].double() - first[at]).abs().max() <= most) for v in others for at in pieces)


def _largest(value: torch.Tensor) -> float:
    """Of what is finite in it."""
    return torch.nan_to_num(value, posinf=0.0, neginf=0.0).abs().max().item() if value.numel() else 0.0


def _describe(name: str, kind: OutputKind, value: torch.Tensor, why: str) -> str:
    ways = {
        "softmax": f"by softmax over {value.shape[-1] if value.ndim else 1}",
        "sigmoid": "by sigmoid",
        "mse": "by normalised MSE",
        "ignore": "ignored",
    }
    return f"{name} {ways[kind]}" + (f" ({why})" if why else "")


def _softmax_distance(y: torch.Tensor, g: torch.Tensor, temperature: float, by: Divergence) -> torch.Tensor:
    """In nats, averaged over positions. A class at -inf, which the guide rules out, counts for nothing in either."""
    y_NV, g_NV = y.flatten(0, -2), g.flatten(0, -2)
    rows = max(1, _PIECE // y_NV.shape[1])
    sums = [_summed(a, b, temperature, by) for a, b in zip(y_NV.split(rows), g_NV.split(rows), strict=True)]
    return exchange.total(torch.stack(sums).sum()) / exchange.place(len(y_NV))[1] * temperature**2


def _summed(y_NV: torch.Tensor, g_NV: torch.Tensor, temperature: float, by: Divergence) -> torch.Tensor:
    y_NV, g_NV = widen(y_NV, g_NV)
    if temperature != 1:
        y_NV, g_NV = y_NV / temperature, g_NV / temperature
    least = torch.finfo(g_NV.dtype).min / 4
    out_NV = g_NV <= least
    if bool(out_NV.any()):
        y_NV, g_NV = y_NV.masked_fill(out_NV, least), g_NV.masked_fill(out_NV, least)
    return _diverged(F.log_softmax(y_NV, -1), F.log_softmax(g_NV, -1), by).sum()


def _sigmoid_distance(y: torch.Tensor, g: torch.Tensor, temperature: float, by: Divergence) -> torch.Tensor:
    """The sum over classes of each one's divergence, averaged over rows."""
    y, g = y / temperature, g / temperature
    if by == "kl":  # the same, without an exponential of a logarithm
        on = g.sigmoid() * (F.logsigmoid(g) - F.logsigmoid(y))
        off = (-g).sigmoid() * (F.logsigmoid(-g) - F.logsigmoid(-y))
    else:
        on = _diverged(F.logsigmoid(y), F.logsigmoid(g), by)
        off = _diverged(F.logsigmoid(-y), F.logsigmoid(-g), by)
    rows = max(1, y.numel() // (y.shape[-1] if y.ndim > 1 else 1))
    return exchange.total((on + off).sum()) / exchange.place(rows)[1] * temperature**2


def _diverged(own: torch.Tensor, guide: torch.Tensor, by: Divergence) -> torch.Tensor:
    """The terms of a divergence, of logarithms of probabilities: KL(guide | own), KL(own | guide), or the mean of both
    from their mixture (Lin 1991).
    """
    if by == "kl":
        return F.kl_div(own, guide, log_target=True, reduction="none")
    if by == "reverse-kl":
        return F.kl_div(guide, own, log_target=True, reduction="none")
    middle = torch.logaddexp(own, guide) - math.log(2)
    return (F.kl_div(middle, guide, log_target=True, reduction="none")
            + F.kl_div(middle, own, log_target=True, reduction="none")) / 2  # fmt: skip


def _squared_distance(
    y: torch.Tensor, g: torch.Tensor, mask_BT: torch.Tensor | None = None, variance: float | None = None
) -> torch.Tensor:
    """|y - g|^2 / |g - mean g|^2, over what is finite in the guide's, and seen; of one row by the `variance` of each
    number.
    """
    finite = g.isfinite()
    if not bool(finite.all()):
        y, g = y.masked_fill(~finite, 0.0), g.masked_fill(~finite, 0.0)
    seen = None if mask_BT is None else mask_BT.view(*mask_BT.shape, *(1,) * (g.ndim - 2))
    if seen is not None:
        y, g = y.masked_fill(~seen, 0.0), g.masked_fill(~seen, 0.0)
    if len(g) == 1 and variance is not None:
        spread = variance * (torch.ones_like(g) if seen is None else seen.expand(g.shape)).sum()
    elif seen is None:
        spread = (g - g.mean(0)).square().sum()
    else:
        spread = (g - g.sum(0) / seen.sum(0).clamp_min(1)).masked_fill(~seen, 0.0).square().sum()
    return (y - g).square().sum() / spread.clamp_min(1e-12 * g.numel())
