"""English that was written to be read: the six novels of Jane Austen, as Debian's r-cran-janeaustenr carries them.

    apt-get download r-cran-janeaustenr
    dpkg-deb -x r-cran-janeaustenr_*.deb build/novels    # or apt-get install it, with the R that it asks for

No R is needed. Its database is a row of serialised objects, each compressed by zlib behind four bytes that say how long
it is, and each novel one vector of lines.
"""

from __future__ import annotations

import re
import struct
import zlib
from functools import cache
from pathlib import Path

from benchmarks.suite import ROOT, BenchmarkError

_DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"

# A string of R's serialisation: nine is the type of a string, the byte before it says its encoding
_STRING = re.compile(rb"\x00[\x00\x04][\x00-\xff]\x09(?P<size>[\x00-\xff]{4})")
_VECTOR = b"\x00\x00\x00\x10"

# Whole novels are held out.
HELD_OUT = ("Northanger Abbey", "Persuasion")


def database() -> Path | None:
    """Where the novels are, None where they are not installed."""
    return next((p for p in (ROOT / "build" / "novels" / _DATABASE, Path("/", _DATABASE)) if p.is_file()), None)


@cache
def novels() -> dict[str, str]:
    """Title -> text, by title. Raises BenchmarkError where the package is missing or holds something else."""
    path = database()
    if path is None:
        raise BenchmarkError(f"the novels are not installed: see the head of {Path(__file__).name}.")
    packed, found, at = path.read_bytes(), {}, 0
    while at + 4 < len(packed):
        stream = zlib.decompressobj()
        lines = _lines(stream.decompress(packed[at + 4 :]))
        at = len(packed) - len(stream.unused_data)
        title = next((line.title() for line in lines if line.strip()), "")
        found[title.replace("&", "and")] = "\n".join(lines)
    if missing := [title for title in HELD_OUT if title not in found]:
        raise BenchmarkError(f"{path}: expected {missing[0]!r} among the novels, found {', '.join(found)}.")
    return dict(sorted(found.items()))


def _lines(vector: bytes) -> list[str]:
    """The strings of a serialised character vector."""
    found, at = [], vector.index(_VECTOR) + 8
    while match := _STRING.match(vector, at):
        (size,) = struct.unpack(">i", match["size"])
        at = match.end() + max(0, size)
        found.append(vector[match.end() : at].decode("utf-8", "replace"))
    return found
