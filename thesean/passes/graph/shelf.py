"""Tensors that are needed later: in memory up to a bound, past it in files that are mapped back."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass
class Shelf:
    """`keep` returns its values as they are while there is room, then equal ones that lie on disk. Nothing may write
    into those. What is let go of is gone from the disk too; the folder goes with this context manager.
    """

    bound: int = 2**30  # bytes
    _held: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def clear(self) -> None:
        """All that was kept in memory is let go of."""
        self._held = 0

    def keep(self, values: Any) -> Any:
        """Of a nested value, tensor by tensor."""
        return pytree.tree_map_only(torch.Tensor, self._kept, values)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._held + size <= self.bound:
            self._held += size
            return tensor
        return self.map(tensor)

    def map(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on disk, wherever there is room for it there."""
        if not tensor.numel():
            return tensor
        if self._folder is None:
            # a file that is still mapped can't be removed everywhere
            self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        path = Path(self._folder.name) / str(next(self._numbers))
        try:
            # written, not mapped and filled: a disk that is full is an error then, and not the end of the process
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
            mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        except OSError:
            return tensor
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # what is mapped stays, until it is let go of
        return mapped.view(tensor.shape).to(tensor.device)
