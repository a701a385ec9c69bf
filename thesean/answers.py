"""How two files that write text answer the same prompts, token by token.

B batch, T time, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thesean.deploy.session import Session
from thesean.deploy.streams import tokens_of
from thesean.errors import DataError
from thesean.report.answers import Answer, Answers, Decode


def compare_answers(
    guide: Session | str | Path,
    converted: Session | str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    stop_ids: Sequence[int] = (),
    decode: Decode | None = None,
) -> Answers:
    """Both files write on from each prompt, always the likeliest token, until one of `stop_ids`. The guide's is what
    `thesean.export_guide` wrote, the other what `converted.export` did; each as a path or a session that is open.
    `decode` makes text of tokens. What comes of it prints, and goes into `converted.report.html(answers=)`. Raises
    DataError where there is no prompt, one is empty or longer than a file reads, or a file writes no text; ExportError
    for a file that is no model.
    """
    asked = [tokens_of(prompt) for prompt in prompts]
    if not asked:
        raise DataError("prompts is empty: expected at least one sequence of tokens.")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens: expected at least 1, found {max_new_tokens!r}.")
    sessions = [file if isinstance(file, Session) else Session(file) for file in (guide, converted)]
    theirs, own = (session.generate(asked, max_new_tokens, stop_ids=stop_ids) for session in sessions)
    reader = sessions[1].streams()
    answers = []
    for prompt, said, other in zip(asked, theirs, own, strict=True):
        logits_BTV, _ = reader.read(np.array([[*prompt, *said[:-1]]]))
        chosen_T = logits_BTV[0, len(prompt) - 1 :].argmax(-1).tolist()
        agrees = tuple(a == b for a, b in zip(chosen_T, said, strict=True))
        answers.append(Answer(prompt=tuple(prompt), guide=tuple(said), converted=tuple(other), agrees=agrees))
    return Answers(answers=tuple(answers), decode=decode)
