"""The rows of the study `matrix`, in the order in which they are measured: what matters most comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import thesean
from benchmarks.language import recipe
from benchmarks.paper.conversions import Conversion
from benchmarks.suite import Run

RateOf = Callable[[str, str], float]  # of a conversion's method

# The paper's four conversions. Others are variants of these.
CORE = ("convnet to MLP", "deep to shallow convnet", "ViT to token-wise MLP", "GPT-2 to Elman")
METHODS = ("default", "paper", "scratch", "distillation")
VARIED = ("convnet to MLP", "GPT-2 to Elman")  # one setting at a time, from the paper's recipe

# Peak learning rates of the three methods that don't look for their own: all are tried with the first seed and a
# trained guide, the rows "rate ...", and what is best on validation data is what every other row takes.
GRID = (1e-3, 2e-3, 4e-3)
TUNED = METHODS[1:]


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
        # batches of text have too few rows for CKA of whole examples, which the paper's recipe compares
        samples = {"alignment__samples": "tokens"} if conversion.unit == "nats" else {}
        return {
            "recipe": recipe(self.base, conversion.steps, **samples, **self.changes),
            "kind": self.kind,
            "rate": self.rate,
            "batch": round(self.batch * conversion.batch),
            "target": self.target,
        }


class Rates:
    """The best of GRID for a conversion and a method, in what was measured so far; its middle where nothing was. A
    variant takes the rate of the conversion that it is a variant of.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, conversion: str, method: str) -> float:
        rates = {tried(core_of(conversion), method, rate).name: rate for rate in GRID}
        found = {c["name"]: c["validation"] for c in self.run.rows if c["name"] in rates and "validation" in c}
        return rates[min(found, key=found.__getitem__)] if found else GRID[1]


def untuned(conversion: str, method: str) -> float:
    """For whoever wants the names of rows alone."""
    return GRID[1]


def core_of(conversion: str) -> str:
    """Whose variant it is."""
    return next(name for name in CORE if name.split(" to ")[0] == conversion.split(" to ")[0])


def tried(conversion: str, method: str, rate: float) -> Row:
    return row(conversion, method, rate, what=f"{method}, rate {rate:g}")


def row(conversion: str, method: str, rate: float, trained: bool = True, what: str = "") -> Row:
    """A conversion by the default, which finds its rate, or at this one by the paper's recipe or as a baseline."""
    common: dict[str, Any] = {"conversion": conversion, "what": what or method, "trained": trained}
    if method == "default":
        return Row(**common, changes={})
    if method == "paper":
        return Row(**common, base="paper", changes=at(rate))
    return Row(**common, changes={}, kind=method, rate=rate)


def at(rate: float) -> dict[str, Any]:
    """The paper's recipe has one rate for both of its phases."""
    return {"alignment__learning_rate": rate, "fine_tuning__learning_rate": rate}


def core(conversion: str, rates: RateOf) -> Iterator[Row]:
    """What is trained from nothing is the same beside either guide. Of the first seed the grid has the tuned ones."""
    for method in METHODS:
        yield row(conversion, method, rates(conversion, method))
    for method in ("default", "paper", "distillation"):
        yield row(conversion, method, rates(conversion, method), trained=False)


def varied(conversion: str, rates: RateOf) -> Iterator[Row]:
    """The paper's recipe with one thing changed, and what its reviewers asked to see beside it."""
    rate = rates(conversion, "paper")

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
        yield changed("not recalibrated", alignment__recalibrate=False)
        for norm in ("layer", "batch"):
            yield changed(f"{norm} norm alone", target=thesean.Target("mlp", hidden_norm=norm))


def norms(conversion: str, rates: RateOf) -> Iterator[Row]:
    """Of the convolutional target, which has batch norms by default."""
    rate = at(rates(conversion, "paper"))
    common: dict[str, Any] = {"conversion": conversion, "base": "paper"}
    yield Row(**common, what="paper, not recalibrated", changes={**rate, "alignment__recalibrate": False})
    yield Row(
        **common, what="paper, group norm", changes=rate, target=thesean.Target("resnet-block", hidden_norm="group")
    )


def every(conversions: dict[str, Conversion], seeds: tuple[int, ...], rates: RateOf) -> Iterator[tuple[Row, int]]:
    """Rows and seeds. A row is made when it is asked for: by then its rate was found."""
    first, variants = seeds[0], [name for name in conversions if name not in CORE]

    def of_variants(seed: int, trained: bool, methods: tuple[str, ...]) -> Iterator[tuple[Row, int]]:
        for name in variants:
            for method in methods:
                yield row(name, method, rates(name, method), trained), seed

    def of_changes(seed: int) -> Iterator[tuple[Row, int]]:
        for name in VARIED:
            yield from ((found, seed) for found in varied(name, rates))
        yield from ((found, seed) for found in norms(CORE[1], rates))

    for name in dict.fromkeys([*VARIED, *CORE]):
        yield row(name, "default", GRID[1]), first
        yield from ((tried(name, method, GRID[1]), first) for method in TUNED)
        yield row(name, "default", GRID[1], trained=False), first
    for name in CORE:
        yield from ((tried(name, method, rate), first) for rate in GRID for method in TUNED)
        yield from ((found, first) for found in core(name, rates) if not found.trained)
    yield from of_changes(first)
    yield from of_variants(first, True, METHODS)
    yield from of_variants(first, False, ("default", "paper"))
    for seed in seeds[1:]:
        for name in CORE:
            yield from ((found, seed) for found in core(name, rates))
    for seed in seeds[1:]:
        yield from of_changes(seed)
        yield from of_variants(seed, True, METHODS)
        yield from of_variants(seed, False, ("default", "paper"))
