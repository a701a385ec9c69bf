"""The guide itself with weights of 8 bits: what a plan that is to be faster has to beat, for it replaces nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from thesean.choose.latency import PlanTimer
from thesean.deploy.session import Session
from thesean.distill.evaluate import Judge
from thesean.errors import DataError, ExportError
from thesean.judged import run_as

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GuideInInt8:
    """`share`: of the exact guide's time in the same turns."""

    share: float
    divergence: float

    def told(self, guide_ms: float, bound_ms: float, plans: float | None) -> str:
        """In the clock in which the exact guide takes `guide_ms`; beside the plan's divergence where that is known."""
        ms = self.share * guide_ms
        figures = f"{ms:.3g} ms, {1 / self.share:.2f} times as fast as the guide"
        found = f"the guide itself in int8, nothing replaced: {figures}, divergence {self.divergence:.3g}"
        if ms > bound_ms:
            return f"{found}, not within that bound"
        nearer = plans is not None and self.divergence < plans
        where = "within that bound, and nearer than this plan" if nearer else "within that bound"
        return f"{found}, {where}: thesean.export_guide(model, path, quantize='int8')"


def guide_in_int8(timer: PlanTimer, judge: Judge) -> GuideInInt8 | None:
    """Timed beside the exact one, and judged as it runs, on all that is held out. None, with a log line, where there is
    nothing to quantise.
    """
    try:
        path = timer.guide_in_int8()
        exact, taken = timer.beside_guide(path)
        session = Session(path, threads=1)
        divergence = judge.divergence(
            lambda number, wanted: run_as(wanted, session, judge.batches[number][1]), judge.everything
        )
    except (ExportError, DataError) as error:
        logger.info("the guide in int8 is not tried: %s", error)
        return None
    if taken is None:
        return None
    return GuideInInt8(share=taken.median_ms / exact.median_ms, divergence=divergence)
