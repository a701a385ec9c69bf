"""Does the ONNX file compute what the torch module computes? Errors relative to the output's scale.

B batch, T time
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import fx

from thesean.deploy.relative_error import relative_error
from thesean.errors import ExportError, TheseanError
from thesean.passes.analyse.chunks import cut, join, run_in_chunks, split_inputs
from thesean.passes.analyse.positions import table_rows
from thesean.passes.analyse.receptive_field import receptive_field
from thesean.passes.base import run_passes
from thesean.passes.cast_floats import CastFloats
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.resample import is_mask
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import STREAM, delay_of, flushed, in_time
from thesean.passes.thread_state import FAR, UNTRIED, zero_states

logger = logging.getLogger(__name__)

_SIZES = ((2, 7), (2, 19), (5, 3), (1, 1))
_BATCHES = (1, 2, 5)
_CHUNKS = (1, 5, 1)  # and the rest
_CHUNKED = (3, 20)

# How often, at most, weights are drawn that are so far off, relative to themselves: a dot product of a few hundred
# float32's is off by as much. At one token of a pretrained decoder of 135 M parameters ten draws led between 2e-5 and
# 2e-4 away, torch by 1e-5 and onnxruntime by 4e-4.
_DRAWS, _LAST_PLACES = 8, 2.0**-22

# Where a network amplifies rounding: how many times its own error a file may be away, and how many times the
# tolerance at most. A pretrained decoder of 135 M parameters was seen at 3.1 times its own, on one input and processor.
AMPLIFIED, MOST = 4, 10

IN_TORCH = "chunks in torch vs whole"  # the label of a check that no file has a part in


class Runs(Protocol):
    """A file that is loaded, in whichever runtime."""

    @property
    def is_stateful(self) -> bool: ...

    def run(self, inputs: dict[str, np.ndarray], state: Any = None) -> tuple[dict[str, np.ndarray], Any]: ...


class Check(NamedTuple):
    """One comparison: max|a - b| / max(1, max|b|) over the outputs, infinite where only one side is a number. `void`
    are the outputs in which torch's has no finite number to compare with; NaN where all of them are.
    """

    label: str
    shape: tuple[int, ...]
    max_abs_error: float
    void: tuple[str, ...] = ()

    @classmethod
    def of(cls, label: str, shape: tuple[int, ...], outputs: Sequence[str], errors: Sequence[float]) -> Check:
        """`errors` of the `outputs`; NaN, nothing compared, is no error."""
        void = tuple(name for name, error in zip(outputs, errors, strict=True) if error != error)
        return cls(label, shape, max((e for e in errors if e == e), default=float("nan")), void)


@dataclass(frozen=True, kw_only=True)
class CheckSizes:
    """Sizes of the dynamic dimensions to compare at; `length` is None where time is not dynamic."""

    batch: int
    length: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch,) if self.length is None else (self.batch, self.length)

    def of(self, signature: Signature) -> dict[str, int]:
        return {s: self.batch if s.startswith("batch") else self.length or 1 for s in signature.symbols}

    def within(self, signature: Signature) -> CheckSizes:
        """The nearest ones that the signature's bounds allow."""
        sizes = signature.within(self.of(signature))
        batch = max((n for s, n in sizes.items() if s.startswith("batch")), default=self.batch)
        lengths = [n for s, n in sizes.items() if not s.startswith("batch")]
        return CheckSizes(batch=batch, length=self.length if self.length is None else max(lengths, default=self.length))


def runnable(graph_module: fx.GraphModule, signature: Signature, sizes: CheckSizes) -> bool:
    """Whether the torch module itself runs at these sizes: a short input may not fill a kernel, a long one a table."""
    if not signature.fits(sizes.of(signature)):
        return False
    return outputs_of(graph_module, signature.random_inputs(sizes.of(signature)), sizes.shape) is not None


@torch.no_grad()
def outputs_of(module: fx.GraphModule, inputs: dict[str, torch.Tensor], shape: tuple[int, ...]) -> list[Any] | None:
    """Its outputs in order; None where it doesn't run, at sizes that are told as `shape`."""
    try:
        return leaf_values(module(**inputs))
    except (RuntimeError, IndexError) as error:
        logger.debug("the module does not run at %s: %s", shape, error)
        return None


def sizes_to_check(signature: Signature, long: int | None) -> list[CheckSizes]:
    if signature.lengths:
        wanted = [CheckSizes(batch=b, length=t) for b, t in (*_SIZES, *([(1, long)] if long else []))]
    elif signature.symbols:
        wanted = [CheckSizes(batch=b, length=None) for b in _BATCHES]
    else:
        wanted = [CheckSizes(batch=1, length=None)]
    return list(dict.fromkeys(s.within(signature) for s in wanted))


@torch.no_grad()
def compare_whole(
    session: Runs,
    module: fx.GraphModule,
    signature: Signature,
    sizes: CheckSizes,
    outputs: Sequence[str],
    threaded: fx.GraphModule | None = None,
) -> Check | None:
    """The file against the stateless torch module; None where that doesn't run. A file with state is compared at the
    steps that are no padding: what an attention gives a step which sees none is the guide's own matter; one that
    `threaded` says is late, after it was flushed.
    """
    inputs, shown_BT = with_padding(signature, signature.random_inputs(sizes.of(signature), seed=1))
    expected = outputs_of(module, inputs, sizes.shape) if signature.fits(sizes.of(signature)) else None
    if expected is None:
        return None
    delay = 0 if threaded is None else delay_of(threaded)
    found, _ = session.run(_arrays(_flushed(threaded, inputs)))
    errors = []
    for name, value in zip(outputs, expected, strict=True):
        got, want = in_time(torch.from_numpy(found[name]), value.shape, delay).numpy(), value.numpy()
        if (
            session.is_stateful
            and shown_BT is not None
            and got.shape == want.shape
            and want.shape[:2] == shown_BT.shape
        ):
            got, want = got[shown_BT], want[shown_BT]
        errors.append(relative_error(got, want))
    return Check.of("onnxruntime vs torch", sizes.shape, outputs, errors)


def compare_all(
    session: Runs,
    threaded: fx.GraphModule | None,
    module: fx.GraphModule,
    signature: Signature,
    names: Sequence[str],
    train_length: int | None,
) -> tuple[list[Check], list[str]]:
    """All comparisons, and a note for each size at which the module itself doesn't run."""
    longest = table_rows(module)
    long = None if train_length is None else min(4 * train_length, longest or 4 * train_length)
    found = {s: compare_whole(session, module, signature, s, names, threaded) for s in sizes_to_check(signature, long)}
    checks = [check for check in found.values() if check is not None]
    no = "the torch module doesn't run there either"
    skipped = [f"not checked at {s.shape}: {no}" for s, check in found.items() if check is None]
    if threaded is not None:
        checks += compare_chunks(session, threaded, module, signature, names, longest)
    return checks, skipped


@torch.no_grad()
def compare_chunks(
    session: Runs,
    threaded: fx.GraphModule,
    module: fx.GraphModule,
    signature: Signature,
    outputs: Sequence[str],
    longest: int | None,
) -> list[Check]:
    """Chunks with the state carried against the whole sequence, in onnxruntime and in torch; once more past all that
    the graph compares positions with, on the caller's own sequences.
    """
    length = max(_CHUNKED[1], receptive_field(module.graph) + 2)
    sizes = CheckSizes(batch=_CHUNKED[0], length=min(length, longest or length)).within(signature)
    checks = _compare_chunks(session, threaded, module, signature, outputs, sizes)
    if not checks:
        raise ExportError(f"the torch module doesn't run at {sizes.shape}, where chunks are compared with the whole.")
    far = CheckSizes(batch=1, length=int(threaded.meta[FAR])).within(signature)
    if (far.length or 0) > (sizes.length or 0) and signature.fits(far.of(signature)):
        checks += _compare_chunks(session, threaded, module, signature, outputs, far, in_order=True)
    return checks


def _compare_chunks(
    session: Runs,
    threaded: fx.GraphModule,
    module: fx.GraphModule,
    signature: Signature,
    outputs: Sequence[str],
    sizes: CheckSizes,
    in_order: bool = False,
) -> list[Check]:
    delay, batch = delay_of(threaded), sizes.batch
    chunks = cut((sizes.length or 1) + delay, _CHUNKS)
    inputs = signature.random_inputs(sizes.of(signature), seed=2, in_order=in_order)
    whole = outputs_of(module, inputs, sizes.shape)
    if whole is None:  # at so many steps, perhaps for want of memory
        return []
    inputs, stream = _flushed(threaded, inputs), threaded.meta.get(STREAM, signature)
    in_torch, _ = run_in_chunks(threaded, stream, inputs, zero_states(threaded, batch), chunks)
    in_onnx, state = [], None
    for piece in split_inputs(stream, inputs, chunks):
        found, state = session.run(_arrays(piece), state)
        in_onnx.append([torch.from_numpy(found[name]) for name in outputs])
    checks = []
    for label, pieces in (("chunks in onnxruntime vs whole", in_onnx), (IN_TORCH, in_torch)):
        errors = []
        for index, value in enumerate(whole):
            joined = join([piece[index] for piece in pieces], value.shape, delay)
            if not isinstance(joined, str):
                joined = in_time(joined, value.shape, delay)
            errors.append(float("inf") if isinstance(joined, str) else relative_error(joined.numpy(), value.numpy()))
        checks.append(Check.of(label, sizes.shape, outputs, errors))
    return checks


def _flushed(threaded: fx.GraphModule | None, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a stream that is late takes them."""
    late = threaded is not None and delay_of(threaded)
    return flushed(threaded.meta[STREAM], inputs, delay_of(threaded)) if threaded is not None and late else inputs


@torch.no_grad()
def rounding(
    module: fx.GraphModule, signature: Signature, shape: tuple[int, ...], enough: float = float("inf")
) -> float:
    """How far rounding leads a float32 module from its own outputs in float64, as errors of files are counted; 0 where
    it can't be run in float64.

    The largest of what it computes itself, and of what float64 makes of weights that are a few units in the last place
    off: any order of float32's sums is as good as exact sums over such weights, and where one input amplifies that, one
    order of sums may be lucky. Weights are drawn no more often than until it is `enough`.
    """
    inputs = signature.random_inputs(CheckSizes(batch=shape[0], length=(*shape[1:], None)[0]).of(signature), seed=1)
    try:
        double, _ = run_passes(module, FreezeOnCpu(), CastFloats({torch.float32: torch.float64}))
        given = {n: v.double() if v.dtype == torch.float32 else v for n, v in inputs.items()}
        exact = leaf_values(double(**given))
        led = _apart(leaf_values(module(**inputs)), exact)
        for seed in range(_DRAWS):
            if led >= enough:
                break
            _shake(double, seed)
            led = max(led, _apart(leaf_values(double(**given)), exact))
            _shake(double, seed, back=True)
    except (RuntimeError, TheseanError) as error:
        logger.debug("the module does not run in float64: %s", error)
        return 0.0
    return led


def _shake(module: fx.GraphModule, seed: int, back: bool = False) -> None:
    """Each weight by a few units in float32's last place; `back` to what it was."""
    draw = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        by = 1 + _LAST_PLACES * torch.randn(weight.shape, generator=draw, dtype=torch.float32).to(weight.dtype)
        weight.data = weight / by if back else weight * by  # not into another module's own


def _apart(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    errors = [relative_error(a.numpy(), b.numpy()) for a, b in zip(found, exact, strict=True)]
    return max((e for e in errors if e == e), default=0.0)


def with_padding(
    signature: Signature, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], np.ndarray | None]:
    """Masks with a padded tail: an all-visible one would not show whether the file reads it. And the steps that all of
    them show, None without masks.
    """
    shown: np.ndarray | None = None
    for spec in signature.inputs:
        value = inputs[spec.name]
        known = spec.example if spec.example is not None else value
        numbers = spec.mask or not (value.is_floating_point() or value.dtype == torch.bool)
        flat = spec.high is None and len(spec.shape) == 2 and not spec.held
        if flat and numbers and is_mask(known) and value.shape[1] > 2:
            tail = value[0, -(value.shape[1] // 3) :]
            tail.copy_(1 - tail)
            same = (value == value[:, :1]).numpy()
            shown = same if shown is None or shown.shape != same.shape else shown & same
    return inputs, shown


def largest(checks: Sequence[Check]) -> str:
    """The largest error of all that was compared, as text."""
    compared = [c for c in checks if c.max_abs_error == c.max_abs_error]
    if not compared:
        return "nothing could be compared"
    worst = max(compared, key=lambda c: c.max_abs_error)
    return f"largest error {worst.max_abs_error:.1e} ({worst.label} at {tuple(worst.shape)})"


def not_comparable(checks: list[Check]) -> str:
    """What stands against a comparison, "" where all that could be was made."""
    if not checks:
        return "the torch module runs at none of the sizes to compare at: pass train_length="
    void = next((c for c in checks if c.void), None)
    if void is None:
        return ""
    return (
        f"{void.label} at {void.shape}: expected finite numbers to compare, found none in the torch module's own "
        f"{', '.join(void.void)}"
    )


def untried_of(threaded: fx.GraphModule | None) -> tuple[int, ...]:
    """What a stream compares its positions with and was not seen to pass."""
    return () if threaded is None else tuple(threaded.meta[UNTRIED])


def untried(constants: Sequence[int]) -> str:
    steps = ", ".join(map(str, constants))
    return (
        f"with state not tried past step {steps}, with which positions are compared: the network may go another way "
        "there, and so many steps would take too long"
    )


def allowed_error(
    checks: list[Check],
    tolerance: float,
    path: Path,
    rounding_at: Callable[[tuple[int, ...], float], float],
    advice: str = "Try another opset=, or raise tolerance= if that is good enough for you.",
    asked: bool = False,
) -> tuple[float, str]:
    """The error that no check is above, and a note where that is more than `tolerance`.

    A network may amplify rounding, so that it is far from its own outputs in float64, `rounding_at` a shape, which is
    told how far would be enough. A file that computes the same in another order is then as far from them, give or take:
    AMPLIFIED times that from torch's is allowed, up to MOST times the tolerance, unless this was `asked` for. Raises
    ExportError where a check is above what is allowed.
    """
    compared = [c for c in checks if c.max_abs_error == c.max_abs_error]
    worst = max(compared, key=lambda c: c.max_abs_error, default=None)
    if worst is None or worst.max_abs_error <= tolerance:
        return tolerance, ""
    logger.info("%s: an error of %.1e: comparing the network with itself in float64", path, worst.max_abs_error)
    own = rounding_at(worst.shape, worst.max_abs_error / AMPLIFIED)
    told = f"the network itself is led {own:.1e} away from what it computes in float64 by rounding, which it amplifies"
    allowed = min(AMPLIFIED * own, MOST * tolerance)
    if not asked and worst.max_abs_error <= allowed:
        held = f"{AMPLIFIED} times that" if allowed < MOST * tolerance else f"{allowed:.0e}"
        return allowed, f"{told}, and the file is held to {held}"
    if own > tolerance / 2:
        advice = (
            f"{told[0].upper()}{told[1:]}: no file can be held against it. Look at what it computes, or raise "
            "tolerance=."
        )
    raise ExportError(
        f"{path}: {worst.label} at {worst.shape}: expected an error of at most {tolerance:.0e} of the output's scale, "
        f"found {worst.max_abs_error:.1e}. No file was written. {advice}"
    )


def _arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


@torch.no_grad()
def refuses_negative(module: fx.GraphModule, signature: Signature, name: str) -> bool:
    """Whether torch finds no row -1 in the table that an input indexes: onnxruntime reads the last one."""
    sizes = signature.within(CheckSizes(batch=2, length=7).of(signature))
    inputs = signature.random_inputs(sizes)
    try:
        module(**inputs)
    except (RuntimeError, IndexError):
        return False  # nothing is known
    try:
        module(**{**inputs, name: torch.full_like(inputs[name], -1)})
    except (RuntimeError, IndexError):
        return True
    return False
