"""What is saved, killed, altered and called: small conversions that are made once, without a step of gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import thesean
from benchmarks.hostility.guides import Blocks, Words, ids, seeded, vectors


@cache
def converted(seed: int = 0) -> thesean.Converted:
    """Of vectors. Another seed is another version of it, told by its report."""
    if seed:
        first = converted()
        return thesean.Converted(first.module, first.signature, first.plan, replace(first.report, seed=seed))
    return thesean.compile(seeded(Blocks), "narrow", data=vectors(), recipe="fast", progress=False)


@cache
def of_words() -> thesean.Converted:
    """Of ids, with a table of positions that ends."""
    return thesean.compile(seeded(Words), "narrow", data=ids(), recipe="fast", progress=False)
