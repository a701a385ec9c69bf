from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from thesean.curve import Curve, Tracing


def test_a_curve_comes_back_from_json_as_it_was():
    tracing = Tracing("align", "h.0", 1e-3, losses=[2.0, 1 / 3], held_out=[(0, 3.0), (2, 2.5)])
    curve = tracing.done(kept=2)
    assert Curve.from_dict(json.loads(json.dumps(asdict(curve)))) == curve
    assert curve.losses == (2.0, 0.333333)
    assert (curve.steps, curve.every) == (2, 1)


@pytest.mark.parametrize(("steps", "every"), [(500, 1), (501, 2), (10_000, 20)])
def test_a_long_curve_holds_means(steps, every):
    curve = Tracing("fine-tune", None, 1e-3, losses=[float(k) for k in range(steps)]).done(kept=0)
    assert (curve.every, curve.steps) == (every, steps)
    assert len(curve.losses) <= 500
    assert curve.losses[0] == sum(range(every)) / every


def test_a_curve_reads_as_a_line():
    held_out = [(step, 2 - step / 100) for step in range(0, 100, 10)]
    curve = Tracing("fine-tune", None, 3e-4, losses=[1.0] * 90, held_out=held_out).done(kept=90)
    assert str(curve) == (
        "fine-tune, rate 0.0003: held out 2.0000 1.9000 1.8000 1.7000 ... 1.3000 1.2000 1.1000; kept step 90 of 90"
    )
    assert "align h.0, rate 1" in str(Tracing("align", "h.0", 1.0).done(kept=0))
