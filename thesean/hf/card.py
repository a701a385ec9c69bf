"""The model card of a converted network: what it is, what was lost, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from thesean.errors import DISTRIBUTION
from thesean.passes.graph.guide_class import GuideClass
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import PlannedPart
from thesean.report.conversion import ConversionReport
from thesean.units import quantity

# A card that holds this line is written anew with each save.
WRITTEN = "<!-- Written by thesean.hf. Without this line it stays as you leave it. -->"

_LOAD = {
    True: """import thesean.hf  # pip install '{distribution}[hf]'
from transformers import AutoModelForCausalLM{tokenizers}

model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    False: """import thesean.hf  # pip install '{distribution}[hf]'

model = thesean.hf.from_pretrained("FOLDER")""",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card is of. `licence`: the guide's, None where nobody stated it."""

    plan: Plan
    report: ConversionReport
    guide: GuideClass | None
    licence: str | None
    generates: bool
    has_tokenizer: bool
    trained_further: bool = False
    native: str | None = None  # the class that loads it without Thesean


def card_text(card: Card) -> str:
    """Markdown, with the Hub's metadata in front."""
    licence = card.licence or "not stated"
    head = ["---", f"library_name: {'transformers' if card.native else 'thesean'}"]
    head += [f"license: {json.dumps(card.licence)}"] if card.licence else []
    head += ["pipeline_tag: text-generation"] if card.generates else []
    head += ["tags:", "- thesean", "---", "", WRITTEN, ""]
    kind = None if card.guide is None else card.guide.path.rpartition(".")[2]
    replaced = card.plan.replaced
    targets = ", ".join(sorted({part.target for part in replaced})) or "nothing"
    what = (
        f"{kind or 'A network'} (the guide) in which {len(replaced)} of {len(card.plan)} parts became another "
        f"architecture ({targets}), made with Thesean. {quantity(card.report.params)} parameters, the guide "
        f"{quantity(card.plan.params)}."
    )
    body = [
        "# A converted network",
        "",
        what,
        "",
        f"Licence of the guide: {licence}. This network is made of the guide's weights.",
        "",
        "## What was lost",
        "",
        *_figures(card.report),
        *(["", "It was trained further after that: these are the conversion's own figures."] * card.trained_further),
        "",
        *(f"- {note}" for note in (*card.plan.notes, *card.report.notes)),
        "",
        "## Plan",
        "",
        "| part | became | parameters before | after |",
        "|---|---|---:|---:|",
        *(_row(part) for part in card.plan),
        "",
        "## Load it",
        "",
        "```python",
        *_loading(card).splitlines(),
        "```",
        "",
    ]
    return "\n".join((*head, *body))


def _loading(card: Card) -> str:
    if card.native:
        return f'from transformers import {card.native}\n\nmodel = {card.native}.from_pretrained("FOLDER")'
    tokenizers = ", AutoTokenizer" if card.has_tokenizer else ""
    lines = _LOAD[card.generates].format(distribution=DISTRIBUTION, tokenizers=tokenizers)
    if card.generates and card.has_tokenizer:
        lines += '\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    return lines


def _figures(report: ConversionReport) -> list[str]:
    rows = [
        (name, report.guide.get(name), report.converted.get(name))
        for name in ("loss", "metric", "divergence")
        if report.guide.get(name) is not None or report.converted.get(name) is not None
    ]
    if not rows:
        return ["Nothing was measured."]
    told = ["" if v is None else f"{v:.4f}" for _, *values in rows for v in values]
    return [
        "On the same held-out data:",
        "",
        "| | guide | this network |",
        "|---|---:|---:|",
        *(f"| {name} | {told[2 * k]} | {told[2 * k + 1]} |" for k, (name, *_) in enumerate(rows)),
    ]


def _row(part: PlannedPart) -> str:
    options = ", ".join(f"{k}={v}" for k, v in part.options.items())
    became = f"{part.target}({options})" if options else part.target
    after = part.params if part.kept else part.new_params
    return f"| {part.path} | {became} | {quantity(part.params)} | {quantity(after)} |".replace("\n", " ")
