"""How far one array is from another, of its scale."""

from __future__ import annotations

import numpy as np

# Numbers that are looked at together: with a vocabulary of 50,000 each copy in float64 of the logits of 4,096 tokens
# would take 1.6 GB, three times what the network's own weights do.
_PIECE = 2**20


def relative_error(found: np.ndarray, expected: np.ndarray, least: float = 1.0) -> float:
    """max|a - b| / max(least, max|b|) where both are finite or the same infinity; infinite where shapes differ or only
    one side is a number; NaN where nothing expected is finite, so that nothing was compared.
    """
    if found.shape != expected.shape:
        return float("inf")
    a_N, b_N = found.reshape(-1), expected.reshape(-1)
    apart, scale, is_compared, differs = 0.0, least, not expected.size, False
    for start in range(0, expected.size, _PIECE):
        a, b = (x_N[start : start + _PIECE].astype(np.float64) for x_N in (a_N, b_N))
        finite = np.isfinite(b)
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True) and bool(np.isfinite(a[finite]).all())
        differs = differs or not same
        if finite.any() and same:
            apart = max(apart, float(np.abs(a[finite] - b[finite]).max()))
            scale = max(scale, float(np.abs(b[finite]).max()))
        is_compared = is_compared or bool(finite.any())
    if not is_compared:
        return float("nan")
    return float("inf") if differs else apart / scale
