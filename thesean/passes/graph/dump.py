"""Write a graph down each time that a pass changed it, so that a person can see what happened to a network.

with dumping("graphs"):
    ...  # 000-capture.txt, 001-split-layers.txt, 002-functionalise.txt...
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import fx

from thesean import ranks
from thesean.errors import WriteError
from thesean.passes.graph.surgery import live_nodes
from thesean.passes.graph.text import text
from thesean.scratch import clear, named, telling
from thesean.warn import warn
from thesean.write_file import write_text

# A part's path may be long, and a file system stops at 255 letters.
_LONGEST = 100


class GraphDump:
    """A folder of numbered files, one a step. Numbers go on behind those of an earlier run: nothing is overwritten."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = named(folder)
        with telling(self.folder, "dump_graphs="):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # now, and not after the capture
                pass
            clear(self.folder)
            taken = [int(found[1]) for p in self.folder.iterdir() if (found := re.match(r"(\d{3,})-.+\.txt$", p.name))]
        self.number = max(taken, default=-1) + 1
        self.failed = False

    def write(self, step: str, graph: fx.Graph, outcome: str, part: str, live: bool) -> None:
        if self.failed:
            return
        title = f"{step} {part}".strip()
        name = re.sub(r"[^\w.=-]+", "-", title)[:_LONGEST]
        lines = [f"# {title}: {outcome}", *text(graph, live_nodes(graph) if live else None), ""]
        try:
            write_text(self.folder / f"{self.number:03d}-{name}.txt", "\n".join(lines))
        except WriteError as error:  # a full disk should not cost a conversion that may be trained already
            self.failed = True
            warn([f"dump_graphs ends here: {error}"])
        self.number += 1


# of this thread and context alone: two conversions side by side write each their own story
_active: ContextVar[GraphDump | None] = ContextVar("thesean_graph_dump", default=None)


@contextmanager
def dumping(folder: str | Path | None) -> Iterator[None]:
    """Inside, every pass writes the graph that it leaves into `folder`; with None, as before.

    Raises WriteError, before anything else happens, when the folder can't be written.
    """
    if folder is None or not ranks.is_first():
        yield
        return
    token = _active.set(GraphDump(folder))
    try:
        yield
    finally:
        _active.reset(token)


@contextmanager
def not_dumping() -> Iterator[None]:
    """Inside, nothing is written: trial hybrids and snapshots are no step of the story."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def dump(step: str, graph_module: fx.GraphModule, outcome: str, part: str = "", live: bool = False) -> None:
    """Tell of one step, where someone listens. With `live`, without the nodes that nothing reads any more."""
    active = _active.get()
    if active is not None:
        active.write(step, graph_module.graph, outcome, part, live)
