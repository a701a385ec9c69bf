"""What guide and converted network answered to the same prompts, and where they part."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Decode = Callable[[list[int]], str]

_SHOWN = 3  # answers that are printed
_WIDTH = 100  # characters of each


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What guide and converted wrote after a prompt, each by itself, always the likeliest token; and of each of the
    guide's tokens, whether the converted network would have gone on with it after the same text.
    """

    prompt: tuple[int, ...]
    guide: tuple[int, ...]
    converted: tuple[int, ...]
    agrees: tuple[bool, ...]

    @property
    def parts_at(self) -> int | None:
        """The first token that is another one; None where both wrote the same."""
        if self.guide == self.converted:
            return None
        pairs = zip(self.guide, self.converted, strict=False)
        return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(self.guide), len(self.converted)))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Prints as a summary and, where `decode` is known, the first answers that part."""

    answers: tuple[Answer, ...]
    decode: Decode | None = None

    @property
    def agreement(self) -> float:
        """Share of the guide's tokens that the converted network would have chosen after the guide's text."""
        return statistics.fmean(float(agrees) for answer in self.answers for agrees in answer.agrees)

    @property
    def same(self) -> int:
        """Answers that are the same to the last token."""
        return sum(answer.parts_at is None for answer in self.answers)

    @property
    def parts_at(self) -> float | None:
        """The median token at which answers part, of those that do."""
        found = [answer.parts_at for answer in self.answers if answer.parts_at is not None]
        return statistics.median(found) if found else None

    @property
    def summary(self) -> str:
        longest = max(len(answer.guide) for answer in self.answers)
        told = (
            f"{len(self.answers)} prompts, up to {longest} tokens each, always the likeliest. After the guide's text "
            f"the next token is the guide's in {self.agreement:.1%}. {self.same} answers are the same"
        )
        return (
            f"{told}." if self.parts_at is None else f"{told}, the others part at token {self.parts_at:.0f} (median)."
        )

    def __str__(self) -> str:
        lines = [self.summary]
        for answer in [a for a in self.answers if a.parts_at is not None][:_SHOWN] if self.decode is not None else ():
            texts = (_short(self.text(tokens)) for tokens in (answer.prompt, answer.guide, answer.converted))
            lines += [f"  {n:<9} {text}" for n, text in zip(("prompt", "guide", "converted"), texts, strict=True)]
        return "\n".join(lines)

    def text(self, tokens: Sequence[int]) -> str:
        """On one line; the tokens themselves where it isn't known how they are read."""
        text = " ".join(map(str, tokens)) if self.decode is None else self.decode(list(tokens))
        return " ".join(text.split())

    def to_json(self) -> str:
        """Tokens, agreement and where they part, of each answer; texts where `decode` is known."""
        rows: list[dict[str, Any]] = []
        for answer in self.answers:
            texts: dict[str, str] = {}
            if self.decode is not None:
                texts = {f"{k}_text": self.decode(list(getattr(answer, k))) for k in ("prompt", "guide", "converted")}
            rows.append({**asdict(answer), "parts_at": answer.parts_at, **texts})
        told = {"agreement": self.agreement, "same": self.same, "parts_at": self.parts_at}
        return json.dumps({**told, "answers": rows}, indent=1)


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
