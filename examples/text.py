"""English that every Python carries: the language reference in `pydoc_data.topics`, as characters.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch

# Whole topics are held out. Many topics quote one another (`compound` contains `try`); these share under 1% of
# their 40-character substrings with the rest, so a low loss on them is not memory.
HELD_OUT = ("calls", "debugger", "import", "objects")

ALPHABET = "\n" + "".join(chr(c) for c in range(32, 127))
_TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})
_INDEX = {c: i for i, c in enumerate(ALPHABET)}


def encode(text: str) -> list[int]:
    """Characters -> token ids; anything outside ASCII becomes '?'."""
    return [_INDEX.get(c, _INDEX["?"]) for c in text.translate(_TYPOGRAPHY)]


def decode(tokens: list[int]) -> str:
    return "".join(ALPHABET[i] for i in tokens)


def corpus(held_out: bool) -> torch.Tensor:
    """All kept (or all held-out) topics, concatenated in alphabetical order, as a 1-D int64 tensor."""
    names = sorted(name for name in topics if (name in HELD_OUT) == held_out)
    return torch.tensor(encode("\n\n".join(topics[name] for name in names)))


@dataclass(frozen=True)
class Windows:
    """Random windows of the corpus, re-iterable: the same batches at every pass, drawn from `seed`.

    Yields `(input_ids_BT, next_ids_BT)`, int64.
    """

    tokens: torch.Tensor
    batches: int
    batch: int = 4
    length: int = 256
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            at = torch.randint(0, len(self.tokens) - self.length - 1, (self.batch,), generator=generator)
            window = torch.stack([self.tokens[i : i + self.length + 1] for i in at.tolist()])
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def __len__(self) -> int:
        return self.batches


def held_out_windows(length: int = 256, batch: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every held-out character once, cut into windows of `length`: no sampling noise in a validation loss."""
    tokens = corpus(held_out=True)
    count = (len(tokens) - 1) // length
    x = tokens[: count * length].view(count, length)
    y = tokens[1 : count * length + 1].view(count, length)
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, count, batch)]
