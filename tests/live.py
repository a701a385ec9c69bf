"""Bytes of tensors that are alive, counted operator by operator: a process's memory tells too little of a small run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """`peak` bytes were alive at once of what was made inside; `given` was there before."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._given = {StorageWeakRef(t.untyped_storage()) for t in given}
        self._sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(made):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if (ref := StorageWeakRef(storage)) not in self._given:
                    self._sizes[ref] = storage.nbytes()
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._sizes.values()))
        return made


class Kept:
    """Bytes of what a forward inside hands on to its backward, each storage once; `given` aside."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        self._given = {t.untyped_storage().data_ptr() for t in given}
        self._kept: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for p, t in self._kept.items() if p not in self._given)

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
