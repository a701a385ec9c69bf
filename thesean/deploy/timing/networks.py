"""Untrained networks as ONNX files: weights do not change how long one takes, so plans are timed before training."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.passes.graph.signature import Signature

logger = logging.getLogger(__name__)


@dataclass
class Networks:
    """Each is exported once, into a folder that goes with this context manager. `train_length` as in `export`."""

    signature: Signature
    train_length: int | None
    _files: dict[Hashable, Path] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __enter__(self) -> Networks:
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def file(self, key: Hashable, make: Callable[[], fx.GraphModule]) -> Path:
        """The file of the network that `make` returns, which is asked for once a key. Raises ExportError, and what
        `make` raises.
        """
        if key not in self._files:
            path = Path(self._folder.name) / f"{next(self._numbers)}.onnx"
            report = export(make(), self.signature, path, train_length=self.train_length)
            logger.info("exported the %s in %.1f s", key if isinstance(key, str) else "network", report.seconds)
            self._files[key] = path
        return self._files[key]

    def session(self, key: Hashable, make: Callable[[], fx.GraphModule]) -> Session:
        """The network in onnxruntime, on one thread. Its file goes: the session holds the weights."""
        path = self.file(key, make)
        session = Session(path, threads=1)
        del self._files[key]
        path.unlink()
        return session
