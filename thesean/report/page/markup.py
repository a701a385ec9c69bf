"""HTML as text: every word that comes from outside is escaped here, once."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import count


def element(tag: str, content: str = "", **attributes: object) -> str:
    """`content` is markup, attributes are not; `class_` is class, `aria_label` aria-label, None leaves one out."""
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    told = "".join(f' {name}="{words(value)}"' for name, value in given)
    return f"<{tag}{told}>{content}</{tag}>"


def words(value: object) -> str:
    """Text as markup; what no browser shows as a character is left visible."""
    text = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in str(value))
    return escape(text, quote=True)


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Heads are columns', the first cell of a row is the row's; a wide one scrolls, by the keyboard too."""
    top = "".join(element("th", words(h), scope="col") for h in heads)
    body = "".join(
        element("tr", "".join([element("th", words(first), scope="row"), *(element("td", words(c)) for c in rest)]))
        for first, *rest in rows
    )
    inner = element("caption", words(caption)) + element("thead", element("tr", top)) + element("tbody", body)
    return element("div", element("table", inner), class_="scroll", role="region", aria_label=caption, tabindex=0)


def figure(title: str, told: str, drawn: str) -> str:
    """A picture with its caption above; nothing without a picture."""
    if not drawn:
        return ""
    return element("figure", element("figcaption", element("b", words(title)) + words(told)) + drawn)


def folded(summary: str, content: str) -> str:
    """Hidden until it is asked for."""
    return element("details", element("summary", words(summary)) + content)


def paragraph(text: str, kind: str | None = None) -> str:
    return element("p", words(text), class_=kind)


class Names:
    """Ids of one page, no two alike."""

    def __init__(self) -> None:
        self._count = count(1)

    def new(self, stem: str) -> str:
        return f"{stem}-{next(self._count)}"
