"""Write docs/targets.md and docs/measures.md from the families and measures themselves, docs/scaling.md from formulas.

python docs/generate.py            # rewrites them
python docs/generate.py --check    # exit 1 when one is stale

B batch, T time, D width of the part, H heads
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import pkgutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from thesean.distill import scaling
from thesean.distill.scaling import Sizes
from thesean.errors import TargetMismatchError
from thesean.similarity import Measure
from thesean.targets import Affine, AttentionFacts, Family, Options, PartFacts, Target, TargetModule, build_module
from thesean.targets.shared.describe_options import describe_options, type_name, value_text

DOCS = Path(__file__).resolve().parent

WIDTH, HEADS, LENGTH = 256, 4, 128  # of the attention whose replacements' states are told


def targets_page() -> str:
    """Every family that comes with Thesean: what it is, what it replaces, its state and its options."""
    families = list(_registered("thesean.targets", "TARGET", Family))
    states = {family.name: state_of(family) for family in families}
    overview = _table(
        ("target", "what it is", "replaces", "carried state"),
        [(f"[`{f.name}`](#{f.name})", f.summary, _replaces(f), states[f.name]) for f in families],
    )
    return "\n".join(
        [
            *_opening("Targets", "thesean/targets/"),
            *_prose(
                f"""The {len(families)} architectures that a part can become. `thesean.compile(model, target=NAME)`
                takes the defaults, `thesean.Target(NAME, option=value)` others. On the command line it is
                `--target NAME:option=value,option=value`, and `thesean targets` lists the names. How to bring one of
                your own is told in the [guide](guide.md#a-target-of-your-own)."""
            ),
            *_prose(
                """"Replaces" is the default: "mixing" takes what mixes over time, such as an attention, and leaves
                token-wise MLPs to the guide; "token-wise" takes those and leaves the rest; "part" takes the whole part;
                "members" drops all members of a merged part but one. `Target(NAME, scope="part")` makes a recurrent
                family replace whole blocks: its module then becomes a residual block with a LayerNorm in front,
                y = x + core(LayerNorm(x)), which is what the options `residual` and `norm` say."""
            ),
            *_prose(
                f""""Carried state" is what each sequence carries from step to step, as a shape, where the target
                replaces a causal attention of width {WIDTH} with {HEADS} heads. A bidirectional part carries none."""
            ),
            *overview,
            *(line for family in families for line in _family(family, states[family.name])),
        ]
    )


def measures_page() -> str:
    """Every measure: what it takes, which way it goes, and its formula."""
    measures = sorted(_registered("thesean.similarity", "MEASURE", Measure), key=lambda m: m.name)
    blind = any(getattr(m, "blind_to", None) for m in measures)
    heads = ["measure", "what it is", "trains", "same width", "better", "examples", *(["blind to"] if blind else [])]
    rows = [
        (
            f"[`{m.name}`](#{m.name})",
            m.summary,
            "yes" if m.differentiable else "no",
            "yes" if m.same_width else "no",
            "higher" if m.higher_is_better else "lower",
            str(m.min_examples),
            *([_listed(getattr(m, "blind_to", ())) or "nothing"] if blind else []),
        )
        for m in measures
    ]
    return "\n".join(
        [
            *_opening("Measures", "thesean/similarity/"),
            *_prose(
                f"""The {len(measures)} measures that `thesean.similarity(x, y, measure=NAME)`, `thesean.compare` and a
                recipe's `alignment: {{measure: NAME}}` take. x and y are activations of the same examples, (N, ...)
                each; `thesean.similarity.get_measure(NAME)` is the measure itself. Its `loss(x, y)` is 0 for equal
                activations and never below, whichever way the value goes; a measure that doesn't train has none."""
            ),
            *_prose(
                """"Trains": it has a gradient. "Same width": x and y must have as many features. "Examples": the least
                number of rows."""
            ),
            *_table(heads, rows),
            *(line for measure in measures for line in _measure(measure)),
        ]
    )


GIB = 2**30


JOB, HARDWARE = scaling.Job(tokens=2**17, steps=2000, batches=16), scaling.Hardware()
RANKS = (1, 8, 64)

GUIDES = {
    # every attention by one of as many weights, whose last layer reads `width` features
    "1B": Sizes(
        guide=1_236_000_000, parts=16, replaced=10_500_000, replacement=10_500_000,
        features=2048, outputs=2048, width=2048, vocabulary=128_256,
    ),
    "7B": Sizes(
        guide=6_738_000_000, parts=32, replaced=67_100_000, replacement=67_100_000,
        features=4096, outputs=4096, width=4096, vocabulary=32_000,
    ),
    "70B": Sizes(
        guide=68_977_000_000, parts=80, replaced=151_000_000, replacement=151_000_000,
        features=8192, outputs=8192, width=8192, vocabulary=32_000,
    ),
}  # fmt: skip


WAYS = {"whole": {}, "anew": {"recomputed": True}, "slices": {"recomputed": True, "sharded": True}}


def scaling_page() -> str:
    """What a run on several accelerators would cost, by the formulas of thesean/distill/scaling.py."""
    memory, cost = [], []
    for guide, sizes in GUIDES.items():
        for ranks in RANKS:
            ways = [scaling.stages_of(sizes, replace(JOB, **way), HARDWARE, ranks) for way in WAYS.values()]
            for found in zip(*ways, strict=True):
                held = [stage.memory for stage in found]
                sent = [stage.traffic / GIB for stage in (found[0], found[2])]
                place = (guide, str(ranks), found[0].name)
                memory.append((*place, *(f"{size / GIB:,.0f}" for size in held), _fits(held)))
                received = (f"{size:,.1f}" if ranks > 1 else "0" for size in sent)
                cost.append((*place, *received, *(_duration(stage.seconds) for stage in found)))
    logits = (
        f"{2 * scaling.outputs_given(sizes, JOB.tokens) / GIB:.0f} GiB for {guide}" for guide, sizes in GUIDES.items()
    )
    return "\n".join(
        [
            *_opening("Scaling", "thesean/distill/scaling.py"),
            *_prose(
                """**These are estimates. Nothing on this page was measured on a GPU.** They come from formulas. What an
                optimizer holds and what a rank sends (gradients, exits, ends and weights of parts, outputs, statistics)
                is compared with small runs on a CPU, to the byte: tests/distill/test_scaling.py and
                tests/test_ranks.py; to a tenth, what a transformer's backward keeps of its activations, with and
                without checkpointing; to a fifth, what is sent of weights in slices. Hours, and the memory of whole
                weights' copies, are compared with
                nothing."""
            ),
            "## What is spread, and what isn't",
            "",
            *_prose(
                """A run [in several processes](guide.md#in-several-processes) is data parallel: each rank computes its
                own rows of a batch. Similarities are computed on examples of all ranks, by each of them."""
            ),
            *_prose(
                """Parts that are aligned independently are spread over the ranks, where there are no fewer of them than
                ranks, no companion looks at the output, and nothing lies in slices. Each rank runs the guide on its own
                rows, and sends what it makes at a part's ends to the rank that has the part, which trains it on all
                rows, with an optimizer for its own parts alone. No gradient is exchanged: of a step the loss and the
                gradient's norm, which are numbers. Weights are handed to all where the parts are judged together, each
                `check_every` steps, and for a checkpoint. More is received than on rows where parts have few weights
                beside a batch's activations (1B below), less where they have many. Closed form, judging and fine-tuning
                are on rows. What a part draws, such as dropout, it draws otherwise than in one process."""
            ),
            *_prose(
                """By default weights, gradients and the optimizer's states are whole on each rank. Where it is the
                activations of a batch that are too much, more ranks help, `activation_checkpointing: true` does (one
                forward of the hybrid more a step), and so does `gradient_accumulation: n` with batches of an nth of the
                rows. Where it is gradients and an optimizer's states, `sharded: true` does: while steps are taken, of
                each weight of guide and hybrid a rank holds a slice, gathered a region at a time, from the end of one
                part to the end of the next, for its forward and where it is computed anew; gradients are summed into
                slices, and only a rank's own are stepped."""
            ),
            *_prose(
                """What `sharded` doesn't do: between steps (closed form, judging states, checkpoints, saving) guide and
                hybrid are whole on each rank, and a copy of the best state is too. A guide that doesn't fit by itself
                still doesn't; of those on this page, 70B in bf16."""
            ),
            *_prose(
                """Why not torch's `fully_shard`: it was tried with torch 2.13 in two gloo processes on a CPU. It runs
                on a graph module as a whole, whose weights it then gathers all at once, and on parts that are modules,
                with the right gradients (sums need `set_force_sum_reduction_for_comms`: gloo has no scaled sum). But
                it puts other tensors in the place of a module's weights: copying a state into them, `deepcopy`, and
                calling a part's `features` by itself, as a closed form does, raise then; regions cut out of a graph
                with a tied table were not brought to run. So weights stay the tensors that they are, and their storage
                comes and goes. A launcher that is told to wrap the model in FSDP or DeepSpeed (`--use_fsdp`) is
                refused."""
            ),
            *_prose(
                f"""Divergences of logits, `thesean.next_token` and `thesean.cross_entropy` are sums over rows, of which
                ranks exchange a number. A loss of your own is computed on all rows, by each rank: that takes the logits
                of the whole batch there, and as much again for their gradient, at {JOB.tokens:,} tokens
                {_listed(logits)}. Such a batch has to be smaller."""
            ),
            "## What is assumed",
            "",
            *_list(
                f"""A global batch of {JOB.tokens:,} tokens; {JOB.steps:,} steps of each stage; {JOB.batches} batches
                for the closed form.""",
                "Weights and activations in bf16; float32 gradients, moments and masters of what is trained.",
                "Every attention is replaced by as many weights; its last layer reads as many features as the width.",
                "1B: 16 blocks of 2,048, a vocabulary of 128,256. 7B: 32 of 4,096, 32,000. 70B: 80 of 8,192, 32,000.",
                "Exits are compared in alignment and all of fine-tuning; the loss is `thesean.next_token`, or none.",
                """Parts are aligned independently, the default: of the hybrid they alone are run. They are spread over
                8 GPUs, and those of 70B over 64, of which some have two parts and most one; elsewhere, and in slices,
                they are trained on rows.""",
                f"""80 GB of memory; {HARDWARE.flops / 1e12:.0f} TFLOP/s (40% of 989); {HARDWARE.within / 1e9:.0f} GB/s
                each way among up to 8, {HARDWARE.between / 1e9:.0f} GB/s among more (70% of 450 and 50). Sums and
                gathers go around a ring, and nothing overlaps.""",
                "No time for reading data, judging held-out batches, checkpoints, measures on the gathered examples.",
            ),
            "## Memory of each rank",
            "",
            *_prose(
                """In GiB: as a recipe is by default, with activations computed anew, and with weights in slices too;
                "fits" is the first of them that fits in 80 GB."""
            ),
            *_table(("guide", "GPUs", "stage", *WAYS, "fits"), memory),
            "",
            "## What each rank receives, and time",
            "",
            *_prose("""GiB in all, and with weights in slices; time in the same three ways."""),
            *_table(("guide", "GPUs", "stage", "received", "in slices", *WAYS), cost),
        ]
    )


def _list(*items: str) -> list[str]:
    found = []
    for item in items:
        found += textwrap.wrap(" ".join(item.split()), 120, initial_indent="- ", subsequent_indent="  ")
    return [*found, ""]


def _fits(memory: Sequence[float]) -> str:
    return next((way for way, size in zip(WAYS, memory, strict=True) if size <= HARDWARE.memory), "no")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"


def state_of(family: Family) -> str:
    """The shape of what one sequence carries, "none" for a module that carries nothing."""
    # a mixer is for one fixed length, a block for no branch of one
    for time, is_branch in (("time", True), ("time", False), (LENGTH, True)):
        try:
            module = build_module(Target(family.name), replace(attention_part(time), is_branch=is_branch))
        except TargetMismatchError:
            continue
        if not isinstance(module, TargetModule) or not module.stateful:
            return "none"
        state = module.initial_state(torch.zeros(1, 1, WIDTH))
        tensors = state if isinstance(state, tuple) else (state,)
        told = [" x ".join(map(str, tensor.shape[1:])) or "a count" for tensor in tensors]
        return " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))
    return "none"


def attention_part(time: int | str) -> PartFacts:
    """A causal attention with projections to copy, as the analysis of a guide would find it."""
    generator = torch.Generator().manual_seed(0)  # equal heads would be read as grouped ones
    projection = Affine(torch.randn(WIDTH, WIDTH, generator=generator), torch.zeros(WIDTH))
    return PartFacts(
        path="attention",
        input_shape=("batch", time, WIDTH),
        output_shape=("batch", time, WIDTH),
        mixing="causal",
        params=4 * WIDTH * (WIDTH + 1),
        attention=AttentionFacts(
            heads=HEADS,
            scale=(WIDTH / HEADS) ** -0.5,
            query=projection,
            key=projection,
            value=projection,
            output=projection,
            plain=True,
        ),
        is_branch=True,
    )


def _family(family: Family, state: str) -> list[str]:
    fields = family.options.model_fields
    lines = [
        "",
        f"## {family.name}",
        "",
        f"{_sentence(family.summary)} Replaces: {_replaces(family)}. Carried state: {state}.",
    ]
    module = family.module
    if module is not TargetModule:
        lines += ["", *_text(module.__doc__)]
    if family.options is not Options:
        lines += ["", *_text(family.options.__doc__)]
    if fields:
        rows = [(f"`{o.name}`", f"`{o.type}`", f"`{o.default}`", o.told) for o in describe_options(family.options)]
        lines += ["", *_table(("option", "type", "default", ""), rows)]
    return lines


def _replaces(family: Family) -> str:
    return "the part, dropped" if family.removes else family.scope


def _measure(measure: Measure) -> list[str]:
    function: Any = inspect.unwrap(measure.value)
    fixed: set[str] = set()
    while isinstance(function, functools.partial):
        fixed |= function.keywords.keys()
        function = function.func
    hints = typing.get_type_hints(function)
    options = [p for p in list(inspect.signature(function).parameters.values())[2:] if p.name not in fixed]
    lines = ["", f"## {measure.name}", "", _sentence(measure.summary), "", *_text(function.__doc__)]
    if options:
        rows = [(f"`{p.name}`", f"`{type_name(hints[p.name])}`", f"`{value_text(p.default)}`") for p in options]
        lines += ["", *_table(("option", "type", "default"), rows)]
    return lines


def _registered(package: str, name: str, kind: type) -> Iterator[Any]:
    """What the files of a folder define, in the order of their names; what users registered stands elsewhere."""
    folder = importlib.import_module(package)
    for info in pkgutil.iter_modules(folder.__path__):
        found = getattr(importlib.import_module(f"{package}.{info.name}"), name, None)
        if isinstance(found, kind):
            yield found


def _text(docstring: str | None) -> list[str]:
    """A docstring as it stands: its formulas are plain text, which Markdown would read as emphasis."""
    return ["```text", *inspect.cleandoc(docstring or "").splitlines(), "```"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (heads, ["---"] * len(heads), *rows))
    return [f"| {line} |" for line in body]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _opening(title: str, source: str) -> list[str]:
    return [f"<!-- made by `python docs/generate.py` from {source} -->", "", f"# {title}", ""]


def _prose(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False), ""]


PAGES: dict[str, Callable[[], str]] = {
    "targets.md": targets_page,
    "measures.md": measures_page,
    "scaling.md": scaling_page,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write targets.md and measures.md from the registries, and scaling.md."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    chosen = parser.parse_args(arguments)
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make() + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not chosen.check:
            path.write_text(text, encoding="utf-8")
    names = ", ".join(stale)
    print(
        f"stale: {names}: run python docs/generate.py"
        if stale and chosen.check
        else f"wrote {names}"
        if stale
        else "up to date"
    )
    return int(bool(stale) and chosen.check)


if __name__ == "__main__":
    sys.exit(main())
