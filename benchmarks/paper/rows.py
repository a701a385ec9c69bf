"""The rows of the study `matrix`, in the order in which they are measured: what matters most comes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import thesean
from benchmarks.language import recipe
from benchmarks.paper.conversions import Conversion

# The paper's four conversions. Others are variants of these.
CORE = ("convnet to MLP", "deep to shallow convnet", "ViT to token-wise MLP", "GPT-2 to Elman")
METHODS = ("default", "paper", "scratch", "distillation")
VARIED = ("convnet to MLP", "GPT-2 to Elman")  # one setting at a time, from the paper's recipe

# Peak learning rates that the three methods which don't look for their own were tried at, seed 0, trained guide: the
# rows "rate ...". What was best on validation data is what all other rows take.
GRID = (1e-3, 2e-3, 4e-3)
_FOUND = {name: dict.fromkeys(METHODS[1:], 2e-3) for name in CORE}


@dataclass(frozen=True, kw_only=True)
class Row:
    """`recipe` is as `benchmarks.language.recipe` takes it; `kind` a baseline's; `batch` a factor of the usual one."""

    conversion: str
    what: str
    trained: bool = True
    base: str = "default"
    changes: dict[str, Any]
    kind: Any = None
    rate: float | None = None
    batch: float = 1.0
    target: Any = None

    @property
    def name(self) -> str:
        return f"{self.conversion}: {self.what}{'' if self.trained else ', untrained guide'}"

    def run(self, conversion: Conversion) -> dict[str, Any]:
        """Arguments of `measured`."""
        return {
            "recipe": recipe(self.base, conversion.steps, **self.changes),
            "kind": self.kind,
            "rate": self.rate,
            "batch": round(self.batch * conversion.batch),
            "target": self.target,
        }


def rate_of(conversion: str, method: str) -> float:
    """The best of GRID; a variant's is that of the conversion whose it is."""
    of = next((name for name in CORE if conversion.split(" to ")[0] == name.split(" to ")[0]), CORE[0])
    return _FOUND[of][method]


def row(conversion: str, method: str, trained: bool = True, rate: float | None = None, what: str = "") -> Row:
    """A conversion by the default, or by the paper's recipe or a baseline at the rate found for it."""
    common: dict[str, Any] = {"conversion": conversion, "what": what or method, "trained": trained, "changes": {}}
    if method == "default":
        return Row(**common)
    rate = rate or rate_of(conversion, method)
    if method == "paper":
        return Row(**common | {"base": "paper", "changes": at(rate)})
    return Row(**common, kind=method, rate=rate)


def at(rate: float) -> dict[str, Any]:
    """The paper's recipe has one rate for both of its phases."""
    return {"alignment__learning_rate": rate, "fine_tuning__learning_rate": rate}


def core(conversion: str) -> Iterator[Row]:
    """What is trained from nothing is the same beside either guide."""
    for method in METHODS:
        yield row(conversion, method)
    for method in ("default", "paper", "distillation"):
        yield row(conversion, method, trained=False)


def tuning(conversion: str) -> Iterator[Row]:
    for method in METHODS[1:]:
        for rate in GRID:
            if rate != rate_of(conversion, method):
                yield row(conversion, method, rate=rate, what=f"{method}, rate {rate:g}")


def varied(conversion: str) -> Iterator[Row]:
    """The paper's recipe with one thing changed, and what its reviewers asked to see beside it."""
    rate = rate_of(conversion, "paper")

    def changed(what: str, batch: float = 1.0, target: Any = None, **changes: Any) -> Row:
        return Row(
            conversion=conversion, what=f"paper, {what}", base="paper", changes=at(rate) | changes, batch=batch,
            target=target,
        )  # fmt: skip

    for schedule in ("sequential", "independent", "joint"):
        yield changed(schedule, alignment__schedule=schedule)
    yield changed("stochastic (BERT-of-Theseus)", alignment__schedule="stochastic")
    yield changed("naive replacement", alignment__schedule="none", alignment__share=0.0, fine_tuning__share=1.0)
    for measure in ("dmnn", "mse", "nmse"):
        yield changed(measure, alignment__measure=measure)
    yield changed("layer-wise distillation", alignment__schedule="independent", alignment__measure="nmse")
    yield changed("nothing solved", alignment__refit=False)
    yield changed("half the batch", batch=0.5)
    yield changed("twice the batch", batch=2.0)
    if conversion == "convnet to MLP":
        normed = thesean.Target("mlp", hidden_norm="batch")
        yield changed("batch norm", target=normed)
        yield changed("batch norm, recalibrated", target=normed, alignment__recalibrate=True)


def norms(conversion: str) -> Iterator[Row]:
    """Of the convolutional target, which has batch norms by default."""
    rate = at(rate_of(conversion, "paper"))
    common: dict[str, Any] = {"conversion": conversion, "base": "paper"}
    yield Row(**common, what="paper, recalibrated", changes={**rate, "alignment__recalibrate": True})
    yield Row(
        **common, what="paper, group norm", changes=rate, target=thesean.Target("resnet-block", hidden_norm="group")
    )


def every(conversions: dict[str, Conversion], seeds: tuple[int, ...]) -> Iterator[tuple[Row, int]]:
    """Rows and seeds. Rates are compared by the first seed alone."""
    first, variants = seeds[0], [name for name in conversions if name not in CORE]
    for name in CORE:
        yield from ((found, first) for found in core(name))
    for name in variants:
        yield from ((row(name, method), first) for method in METHODS)
    for name in CORE:
        yield from ((found, first) for found in tuning(name))
    for seed in seeds:
        for name in VARIED:
            yield from ((found, seed) for found in varied(name))
        yield from ((found, seed) for found in norms(CORE[1]))
        for name in variants:
            yield from ((row(name, method, trained=False), seed) for method in ("default", "paper"))
        if seed == first:
            for more in seeds[1:]:
                for name in CORE:
                    yield from ((found, more) for found in core(name))
        else:
            for name in variants:
                yield from ((row(name, method), seed) for method in METHODS)
