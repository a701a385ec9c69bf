"""How two files that write text answer the same prompts: what each says, and where they part.

B batch, T time, V vocabulary
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from thesean.deploy.session import Session
from thesean.deploy.streams import tokens_of
from thesean.errors import DataError

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

    def __str__(self) -> str:
        longest = max(len(answer.guide) for answer in self.answers)
        at = "-" if self.parts_at is None else f"{self.parts_at:.0f}"
        lines = [
            f"{len(self.answers)} prompts, up to {longest} tokens each, always the likeliest",
            f"  the next token is the guide's after the guide's text in {self.agreement:.1%}",
            f"  {self.same} answers are the same, the others part at token {at} (median)",
        ]
        parted = [a for a in self.answers if a.parts_at is not None]
        for answer in parted[:_SHOWN] if self.decode is not None else ():
            texts = (self._text(tokens) for tokens in (answer.prompt, answer.guide, answer.converted))
            names = ("prompt", "guide", "converted")
            lines += [f"  {name:<9} {text}" for name, text in zip(names, texts, strict=True)]
        return "\n".join(lines)

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

    def _text(self, tokens: Sequence[int]) -> str:
        assert self.decode is not None
        text = " ".join(self.decode(list(tokens)).split())
        return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def compare_answers(
    guide: Session,
    converted: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    stop_ids: Sequence[int] = (),
    decode: Decode | None = None,
) -> Answers:
    """Both files write on from each prompt, greedily, until one of `stop_ids`. The guide's is what
    `thesean.export_guide` wrote. `decode` makes text of tokens. Raises DataError where there is no prompt, one is empty
    or longer than a file reads, or a file writes no text.
    """
    asked = [tokens_of(prompt) for prompt in prompts]
    if not asked:
        raise DataError("prompts is empty: expected at least one sequence of tokens.")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens: expected at least 1, found {max_new_tokens!r}.")
    theirs, own = (file.generate(asked, max_new_tokens, stop_ids=stop_ids) for file in (guide, converted))
    reader = converted.streams()
    answers = []
    for prompt, said, other in zip(asked, theirs, own, strict=True):
        logits_BTV, _ = reader.read(np.array([[*prompt, *said[:-1]]]))
        chosen_T = logits_BTV[0, len(prompt) - 1 :].argmax(-1).tolist()
        agrees = tuple(a == b for a, b in zip(chosen_T, said, strict=True))
        answers.append(Answer(prompt=tuple(prompt), guide=tuple(said), converted=tuple(other), agrees=agrees))
    return Answers(answers=tuple(answers), decode=decode)
