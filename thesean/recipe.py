"""How a conversion is aligned and fine-tuned: frozen settings that round-trip to YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from thesean import plain_yaml
from thesean.errors import TheseanError, unknown_name
from thesean.scratch import named
from thesean.write_file import write_text

Positions = Literal["clamp", "wrap", "drop", "refuse"]
Precision = Literal["as-is", "bfloat16"]
Divergence = Literal["kl", "reverse-kl", "js"]
PartInputs = Literal["guide", "hybrid", "mixed"]
Samples = Literal["tokens", "examples"]
Reduction = Literal["sum", "mean"]
Optimizer = Literal["adamw", "adam"]
RateSchedule = Literal["cosine", "constant"]
Annealing = Literal["new", "all"]
Weight = Annotated[float, Field(gt=0)]
Measures = Annotated[
    Annotated[str, Tag("name")] | Annotated[dict[str, Weight], Field(min_length=1), Tag("sum")],
    Discriminator(lambda given: "sum" if isinstance(given, Mapping) else "name"),
]

# Peak learning rates that a search goes through, in this order.
RATES = (2e-3, 1e-3, 3e-4, 1e-4, 3e-5)

_RETRY_STEPS = 100

_ALIGNED = 0.1  # of the steps, unless a trial or the recipe says otherwise

_LEAST_BATCHES = 16  # of a closed form that finds out how many it takes


class RecipeError(TheseanError, ValueError):
    """A recipe file that can't be read or a setting out of range."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def weights_of(measures: str | Mapping[str, float]) -> dict[str, float]:
    """Of measures, by their names."""
    return {measures: 1.0} if isinstance(measures, str) else dict(measures)


class ClosedForm(_Settings):
    """Ridge regression of each part's last linear layer on the guide's activations, part after part, in eval mode."""

    enabled: bool = True
    # "auto": at least 16, and so many more that layers see enough rows for what they read; see distill/enough.py
    batches: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    ridge: float = Field(default=1e-3, gt=0, description="relative to the mean diagonal of the features' covariance")
    # Layers copied from the guide too: without a gradient the demo's linear attention is at 1.777 and not 3.462 nats:
    # benchmarks/results/recipes.json.
    solve_copied: bool = True

    @property
    def least(self) -> int:
        """Batches that are read where the data has as many."""
        return _LEAST_BATCHES if self.batches == "auto" else self.batches


class Alignment(_Settings):
    """Gradient steps that bring parts to the guide's activations, before the network is trained as a whole."""

    schedule: Literal["progressive", "sequential", "independent", "joint", "stochastic", "none"] = "independent"
    # In which progressive and sequential stages take the parts: "easiest-first" is by how far the guide with one part
    # replaced, in closed form, is from the guide.
    order: Literal["front-to-back", "back-to-front", "easiest-first"] = "front-to-back"
    # What a part reads while it is trained: the guide's activations, the hybrid's own, or "mixed", the mean of the
    # losses on both. None: the guide's where the schedule is independent, the hybrid's elsewhere.
    inputs: PartInputs | None = None
    # At parts' exits: a measure, or several with their weights
    measure: Measures = "nmse"
    # What a row is of the matrices that a measure compares, where activations are of sequences: each of their tokens,
    # or each sequence with its tokens side by side. Of images and vectors a row is an example either way.
    samples: Samples = "tokens"
    normalize_rows: bool = Field(default=False, description="to length 1, of both sides, before they are compared")
    weights: dict[str, Weight] = Field(default={}, description="of parts, by globs; the last one that fits")
    reduction: Reduction = Field(default="sum", description="over the parts that a stage compares")
    # Of single stages of progressive and sequential: by globs over the part that is new in them, or by their place,
    # from 1; the last one that fits. All parts that such a stage compares are compared by it.
    stage_measures: dict[Annotated[int, Field(ge=1, strict=True)] | str, Measures] = {}
    # Companions of the measure, of the network in which the parts so far are replaced
    output: Divergence | None = Field(default=None, description="divergence of the outputs, hybrid from guide")
    output_weight: Weight = 1.0
    task: float = Field(default=0.0, ge=0, description="weight of the user's loss")
    # Stochastic: the probability that a part is swapped in, which rises from the first step on, linearly
    swap_from: float = Field(default=0.3, ge=0, le=1)
    swap_all_at: float = Field(default=0.8, gt=0, le=1, description="share of the steps after which it is 1")
    # Running statistics of the parts' batch norms, computed anew on the closed form's batches before a stage is judged
    recalibrate: bool = False
    # Of the recipe's steps, over all stages. "auto": a tenth; where nothing but outputs is trained for, which are few,
    # all parts are aligned at once and steps suffice, what a trial tells; see distill/budget.py
    share: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    learning_rate: float = Field(default=3e-3, gt=0)
    # A stage ends early when the refitted held-out measure stopped improving, or reached its ceiling.
    check_every: int = Field(default=20, ge=1)
    patience: int = Field(default=3, ge=1)
    min_improvement: float = Field(default=0.01, ge=0, description="relative; less counts as no improvement")
    ceiling: float = Field(default=0.002, ge=0, description="loss below which a stage is done")
    refit: bool = True
    refit_all: bool = Field(default=True, description="refit parts 1..k after stage k, not k alone")

    @model_validator(mode="after")
    def _consistent(self) -> Alignment:
        if self.order != "front-to-back" and self.schedule not in ("progressive", "sequential"):
            raise ValueError(
                f"order {self.order!r} is one of stages: it needs the schedule 'progressive' or 'sequential', found "
                f"{self.schedule!r}"
            )
        if self.stage_measures and self.schedule not in ("progressive", "sequential"):
            raise ValueError(
                "stage_measures are of one stage each: they need the schedule 'progressive' or 'sequential', found "
                f"{self.schedule!r}"
            )
        if self.inputs is not None and self.schedule in ("stochastic", "none"):
            raise ValueError(f"inputs {self.inputs!r} has no meaning with the schedule {self.schedule!r}: leave it out")
        return self

    @property
    def measures(self) -> dict[str, float]:
        """Weights by name."""
        return weights_of(self.measure)

    @property
    def all_measures(self) -> list[str]:
        """Names, those of single stages too."""
        return list(
            dict.fromkeys(name for some in (self.measure, *self.stage_measures.values()) for name in weights_of(some))
        )

    @property
    def reads(self) -> PartInputs:
        return self.inputs or ("guide" if self.schedule == "independent" else "hybrid")

    @property
    def refits(self) -> bool:
        """Whether parts are solved anew each time that a stage is judged. A stochastic one compares no exits."""
        return self.refit and self.schedule != "stochastic"

    @property
    def usual(self) -> float:
        """The share of the steps where no trial tells."""
        return _ALIGNED if self.share == "auto" else self.share

    @property
    def at_once(self) -> bool:
        """Whether all parts are trained in one stage."""
        return self.schedule in ("joint", "independent", "stochastic")


class FineTuning(_Settings):
    """End-to-end training of the fully replaced network."""

    share: float = Field(default=0.9, ge=0, le=1)
    # "find": the highest of RATES that gains anything from the start at hand; see fine_tune.py and
    # benchmarks/results/starts.json
    learning_rate: Annotated[float, Field(gt=0)] | Literal["find"] = "find"
    weight_decay: float = Field(default=0.01, ge=0)
    distillation: float = Field(default=0.9, ge=0, le=1, description="weight of the guide's outputs at the start")
    temperature: float = Field(default=2.0, gt=0)
    divergence: Divergence = Field(default="kl", description="by which outputs are compared where they are classes")
    hidden: float = Field(default=0.3, ge=0, description="weight of the normalised MSE at part exits, annealed")
    anneal_until: float | None = Field(
        default=0.8, gt=0, le=1, description="share of the steps after which both are 0; None: they stay"
    )
    anneal_on: Annealing = Field(default="new", description="examples by which they fall: see fine_tune.py")


class Recipe(_Settings):
    """`Recipe.named("default")`, `Recipe.from_yaml(path)`, or settings of your own."""

    name: str = "custom"
    steps: int = Field(default=400, ge=0, description="optimizer steps in all: alignment and fine-tuning")
    closed_form: ClosedForm = ClosedForm()
    # Of the whole run, in place of `steps`, which is then only whether any are taken: see distill/budget.py
    seconds: float | None = Field(default=None, gt=0)
    alignment: Alignment = Alignment()
    fine_tuning: FineTuning = FineTuning()
    # AdamW decays weights apart from the gradient, Adam adds the decay to it: alignment, without decay, is the same
    optimizer: Optimizer = "adamw"
    learning_rate_schedule: RateSchedule = Field(default="cosine", description="after the warm-up")
    warmup: int = Field(default=20, ge=0)
    clip: float = Field(default=1.0, gt=0, description="gradient norm")
    # Positions past the guide's table (a recurrence knows no end): "clamp" reads the last row, "wrap" begins again with
    # the first, "drop" adds nothing, "refuse" leaves the guide's error.
    positions: Positions = "clamp"
    # What steps compute in: "as-is" as the guide does, "bfloat16" under autocast. Weights of half precision have
    # float32 copies while they are trained in either, or they would stand still: a step is less than they can hold.
    precision: Precision = "as-is"
    # Activations that a step's backward would hold are let go, and computed anew for it, region by region: less memory
    # for about one forward more, and the same bits. See distill/recompute.py
    activation_checkpointing: bool = False
    # Of several processes each holds a slice of the weights while steps are taken, and of what an optimizer has beside
    # them: fully sharded data parallel. Activations are computed anew then. See distill/sharded.py
    sharded: bool = False
    # Batches that make a step: their gradients are added up, each weighed by its share of the rows
    gradient_accumulation: int = Field(default=1, ge=1)
    # Parts that stay the guide's, those that it can least do without: see keep_best.py
    keep_best: int = Field(default=0, ge=0)
    # What one part may cost, in the unit of what is judged: the rise of the held-out loss, without a loss= that of the
    # output's divergence from the guide (nats for logits). A part that costs more is tried once more by `second`, and
    # then kept as the guide's; None keeps none.
    max_drop: float | None = Field(default=None, ge=0)
    retry: Recipe | None = Field(default=None, description="what such a part is tried with; None: see `second`")

    @field_validator("retry", mode="before")
    @classmethod
    def _resolved(cls, given: Any) -> Any:
        """A name or a path is good enough, as everywhere."""
        return Recipe.resolve(given) if isinstance(given, (str, Path)) else given

    @model_validator(mode="after")
    def _shardable(self) -> Recipe:
        if self.sharded and self.alignment.schedule == "stochastic":
            raise ValueError(
                "sharded: true has no meaning with the alignment's schedule 'stochastic', which draws each step what "
                "stands in the network: choose another schedule, or activation_checkpointing: true alone"
            )
        return self

    @property
    def second(self) -> Recipe:
        """What a part is tried with that cost more than `max_drop`: of `retry`, its closed form, and its steps of
        alignment on this part alone. By default a closed form that trusts the data less, and where this recipe takes
        steps at all up to a hundred careful ones on what the hybrid gives.
        """
        if self.retry is not None:
            return self.retry
        return Recipe(
            name="retry",
            steps=min(_RETRY_STEPS, self.steps),
            closed_form=self.closed_form.model_copy(update={"enabled": True, "ridge": 100 * self.closed_form.ridge}),
            alignment=Alignment(schedule="sequential", learning_rate=1e-3, share=1.0),
            optimizer=self.optimizer,
            learning_rate_schedule=self.learning_rate_schedule,
            warmup=self.warmup,
            clip=self.clip,
            precision=self.precision,
            activation_checkpointing=self.activation_checkpointing,
            sharded=self.sharded,
            gradient_accumulation=self.gradient_accumulation,
        )

    @property
    def gradients(self) -> bool:
        """Whether any step may be taken."""
        return self.steps > 0 or (self.max_drop is not None and self.second.steps > 0)

    @property
    def trains_by_loss(self) -> bool:
        """Whether any step would go down a user's loss."""
        aligns = self.alignment.usual > 0 and (self.alignment.task > 0 or self.alignment.schedule == "stochastic")
        return self.steps > 0 and (aligns or self.fine_tuning.share > 0)

    @staticmethod
    def named(name: str) -> Recipe:
        """Raises UnknownNameError with the nearest name."""
        if name not in RECIPES:
            raise unknown_name("recipe", name, RECIPES)
        return RECIPES[name]

    @staticmethod
    def resolve(recipe: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
        """A recipe, its settings as a dict, a name, a YAML path, or None for the default. Raises RecipeError."""
        if recipe is None:
            return RECIPES["default"]
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return _validated(dict(recipe), "recipe")
        if not isinstance(recipe, (str, Path)):
            raise RecipeError(f"recipe: expected a Recipe, a dict, a name or a path, found {type(recipe).__name__}.")
        if isinstance(recipe, Path) or str(recipe).endswith((".yaml", ".yml")):
            return Recipe.from_yaml(recipe)
        return Recipe.named(recipe)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """YAML text, written to `path` if given. Raises WriteError."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False)
        if path is not None:
            write_text(path, text)
        return text

    @staticmethod
    def from_yaml(path: str | Path) -> Recipe:
        """Raises RecipeError that names the wrong setting."""
        try:
            text = plain_yaml.text_of(named(path, "read", RecipeError))
            return _validated(plain_yaml.read(text), str(path))
        except OSError as error:
            raise RecipeError(f"can't read the recipe {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error


def _validated(settings: Any, where: str) -> Recipe:
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        first, *others = error.errors()
        place = [str(word) for word in first["loc"]]
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: {'.'.join(place)}: {_unknown(place)}") from error
        expected = first["msg"].removeprefix("Value error, ")
        for other in others:
            if other["type"] == "literal_error" and other["loc"][:-1] == first["loc"][:-1]:  # a number, or a word
                place = place[:-1]
                expected += f", or {other['ctx']['expected']}"
        found = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
        told = ": ".join(filter(None, (where, ".".join(place), expected)))
        raise RecipeError(f"{told}{found}.") from error


def _unknown(place: Sequence[str]) -> str:
    """Of a setting that there is not: the near name, and those that there are."""
    inner: dict[str, type[BaseModel]] = {
        "closed_form": ClosedForm, "alignment": Alignment, "fine_tuning": FineTuning
    }  # fmt: skip
    settings = next((inner[name] for name in reversed(place[:-1]) if name in inner), Recipe)
    return str(unknown_name("setting", place[-1], settings.model_fields))


def _shipped() -> dict[str, Recipe]:
    """The YAML files of `thesean/recipes`, whose comments say what was measured, by their names."""
    texts = {file.name: file.read_text("utf-8") for file in (files("thesean") / "recipes").iterdir()}
    return {
        name.removesuffix(".yaml"): _validated(plain_yaml.read(text), name)
        for name, text in sorted(texts.items())
        if name.endswith(".yaml")
    }


RECIPES: dict[str, Recipe] = _shipped()
