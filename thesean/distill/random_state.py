"""Everything that random numbers are drawn from, out and in again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """Of torch on every device, of Python and of NumPy, whose generators a caller's batches may use."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
        version, numbers, following = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": (version, tuple(numbers), following),
            "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(state["python"])
        kind, keys, place, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))  # noqa: NPY002
