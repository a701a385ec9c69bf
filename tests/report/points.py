"""Points made up for tests, with figures that can be worked out by hand."""

from __future__ import annotations

from thesean.report.points import Cost, Served, TradeOff
from thesean.report.trade_offs import TradeOffs


def cost(ms: float | None) -> Cost | None:
    return None if ms is None else Cost(median_ms=ms, p20_ms=0.9 * ms, p80_ms=1.1 * ms, repeats=5)


def point(name: str, loss: float | None, *ms: float | None, kind: str = "hybrid", form: str = "float32") -> TradeOff:
    """`ms`: a token and a prefill at 8 tokens, then at 64."""
    pairs = zip((8, 64), ms[::2], ms[1::2], strict=True)
    served = tuple(
        Served(batch=1, length=n, prefill=cost(p), token=cost(t), state_bytes=100 * n, peak_memory_mib=12.4)
        for n, t, p in pairs
    )
    return TradeOff(
        name=name, kind=kind, form=form, replaced=0, of=2, divergence=0.25, loss=loss, metric=None, params=2000,  # type: ignore[arg-type]
        file_bytes=8000, token_kind="state", served=served,
    )  # fmt: skip


# at 8 tokens the guide beats all; at 64 the front is converted, then the hybrid, then the guide
FOUND = TradeOffs(
    points=(
        point("guide", 1.0, 1.0, 10.0, 9.0, 100.0, kind="guide"),
        point("1 of 2", 1.25, 2.0, 20.0, 5.0, 50.0),
        point("converted", 1.5, 3.0, 30.0, 1.0, 10.0, kind="converted"),
        point("converted, int8", 1.75, 3.5, None, 2.0, None, kind="converted", form="int8"),
    ),
    unit="nats",
    judged="judged on 4 rows",
    notes=("a <b>note</b>",),
)
