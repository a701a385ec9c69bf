"""What guide and converted answered to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from thesean.report.answers import Answer, Answers
from thesean.report.page.markup import element, paragraph, words

_SHOWN = 12  # answers


def answers_section(found: Answers) -> str:
    """A summary, and answers side by side, the first that part first; the place where they do is marked."""
    parted = sorted((a for a in found.answers if a.parts_at is not None), key=lambda a: a.parts_at or 0)
    shown = [*parted, *(a for a in found.answers if a.parts_at is None)][:_SHOWN]
    items = "".join(_item(answer, found) for answer in shown)
    rest = len(found.answers) - len(shown)
    told = paragraph(found.summary + (f" {rest} more are not shown." if rest else ""), "quiet")
    return told + element("ol", items, class_="lost")


def _item(answer: Answer, found: Answers) -> str:
    at = answer.parts_at
    where = "the same to the end" if at is None else f"part at token {at}"
    said = ((name, getattr(answer, name)) for name in ("guide", "converted"))
    texts = "".join(element("p", f"{element('b', name)} {_marked(tokens, at, found)}") for name, tokens in said)
    return element("li", element("blockquote", words(found.text(answer.prompt))) + texts + paragraph(where, "quiet"))


def _marked(tokens: Sequence[int], at: int | None, found: Answers) -> str:
    if at is None:
        return words(found.text(tokens))
    return words(found.text(tokens[:at])) + " " + element("mark", words(found.text(tokens[at:]) or "(ends)"))
