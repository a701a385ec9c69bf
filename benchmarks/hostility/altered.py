"""Saved conversions that were cut, altered, mixed or made up: `load` refuses them, or loads what was saved.

A row is a function of the folder with a whole conversion in it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import thesean
from benchmarks.hostility.guides import vectors
from benchmarks.hostility.saved import converted, of_words
from benchmarks.hostility.trial import Call, Inputs, check

Change = Callable[[Path], None]
FILES = ("graph.json", "weights.safetensors", "plan.yaml", "report.json", "example.safetensors")


def after(change: Change) -> Call:
    """Loading what a change made of it."""

    def calling(folder: Path) -> None:
        saved = converted().save(folder / "saved")
        change(saved)
        found = thesean.load(saved)
        x_BTD = vectors(1)[0]
        with torch.no_grad():
            check(torch.equal(found(x_BTD), converted()(x_BTD)), "other numbers than were saved")

    return calling


def cut(name: str, share: float) -> Change:
    def change(saved: Path) -> None:
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[: int(share * len(whole))])

    return change


def flipped(name: str, seed: int) -> Change:
    def change(saved: Path) -> None:
        content = bytearray((saved / name).read_bytes())
        chance = random.Random(f"{name} {seed}")
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (saved / name).write_bytes(content)

    return change


def longer(name: str) -> Change:
    def change(saved: Path) -> None:
        with (saved / name).open("ab") as file:
            file.write(b"\0" * 100)

    return change


def gone(name: str) -> Change:
    return lambda saved: (saved / name).unlink()


def a_folder(name: str) -> Change:
    def change(saved: Path) -> None:
        (saved / name).unlink()
        (saved / name).mkdir()

    return change


def a_pipe(name: str) -> Change:
    def change(saved: Path) -> None:
        (saved / name).unlink()
        os.mkfifo(saved / name)

    return change


def anothers(name: str) -> Change:
    """A file of another conversion."""

    def change(saved: Path) -> None:
        other = of_words().save(saved.with_name("other"))
        shutil.copy(other / name, saved / name)

    return change


def written(text: str) -> Change:
    def change(saved: Path) -> None:
        (saved / "graph.json").write_text(text)

    return change


def without(key: str) -> Change:
    def change(saved: Path) -> None:
        document = json.loads((saved / "graph.json").read_text())
        del document[key]
        (saved / "graph.json").write_text(json.dumps(document))

    return change


def _inputs() -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name in FILES:
        for share in (0.0, 0.5, 0.99):
            found[f"{name} cut at {share:.0%}"] = after(cut(name, share))
        for seed in range(3):
            found[f"{name} with a bit flipped, {seed}"] = after(flipped(name, seed))
        found[f"{name} with more behind it"] = after(longer(name))
        found[f"{name} missing"] = after(gone(name))
        found[f"{name} a folder"] = after(a_folder(name))
        found[f"{name} a pipe"] = after(a_pipe(name))
        found[f"{name} of another conversion"] = after(anothers(name))
    for key in ("sha256", "format", "signature", "symbols", "modules", "aliases", "files_sha256", "nodes"):
        found[f"graph.json without {key}"] = after(without(key))
    for what, text in {
        "empty": "", "a list": "[]", "null": "null", "a number": "1e999", "deep": "[" * 100_000, "NaN": "NaN",
        "a dict": "{}", "a long number": "1" * 10_000,
    }.items():  # fmt: skip
        found[f"graph.json that is {what}"] = after(written(text))
    return found


INPUTS: Inputs = _inputs()
