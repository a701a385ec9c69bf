"""Which `thesean bench` is meant: one's own network, or the benchmark suite of a checkout."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

import thesean
from thesean.cli.telling import one_line_errors
from thesean.cli.words import ArgumentError

SUITE = "thesean.suite"  # in a context's meta: the words for the suite

_BOTH = {"--out", "--help"}  # options of either


class NetworkOrSuite(TyperCommand):
    """Options are read where the first word names a network, or where one is given that the suite doesn't have; all
    other words are handed to the suite as they are.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_value = {o: not getattr(p, "is_flag", False) for p in self.params for o in p.opts if o.startswith("-")}
        word, own, left = "", "--help" in args, iter(args)
        for arg in left:
            option = arg.partition("=")[0]
            if option in takes_value:
                own = own or option not in _BOTH
                if takes_value[option] and "=" not in arg:
                    next(left, None)
            elif arg.startswith("-") and arg != "--help":
                break  # the suite's, as is what follows; or nobody's
            elif not word:
                word = arg
        if not own and not names_network(word):
            ctx.meta[SUITE], args = list(args), []
        found: list[str] = super().parse_args(ctx, args)
        return found


def names_network(word: str) -> bool:
    """A folder or package.module:name. Raises typer.Exit for what may as well be a benchmark."""
    if ":" in word:
        return True
    if not os.path.isdir(word):
        return False
    if word not in _benchmarks():
        return True
    if not any((Path(word) / name).exists() for name in ("graph.json", "converted", "config.json")):
        return False
    with one_line_errors(debug=False):
        raise ArgumentError(
            f"bench {word!r} is a benchmark's name and a folder here: write .{os.sep}{word} for the folder, or "
            f"`python -m benchmarks {word}` for the benchmark."
        )
    return True


def run_suite(words: Sequence[str]) -> NoReturn:
    """The suite's own program; a first word that is none of its names ends in an error."""
    with one_line_errors(debug=False):
        first = next(iter(words), "")
        if first and not first.startswith("-") and first not in _benchmarks():
            near = difflib.get_close_matches(first, _benchmarks(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ArgumentError(
                f"bench {first!r}: expected the folder of a saved conversion, a model (package.module:factory or a "
                f"local Hugging Face folder) or, in a checkout, the name of a benchmark; found none of them{hint}"
            )
        if not (_root() / "benchmarks" / "__main__.py").is_file():
            raise ArgumentError(
                "the benchmarks come with a checkout of the source, not with an installed package. Clone it and run "
                "`make bench` there. What is here: `thesean bench DIR|MODEL`."
            )
        sys.path.insert(0, str(_root()))
        suite: Any = importlib.import_module("benchmarks.__main__")
    raise typer.Exit(suite.main(list(words), program="thesean bench"))


def _root() -> Path:
    return Path(thesean.__file__).resolve().parents[1]


def _benchmarks() -> list[str]:
    folder = _root() / "benchmarks"
    return sorted(p.stem for where in (folder, folder / "studies") for p in where.glob("[!_]*.py"))
