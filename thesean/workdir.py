"""A run's folder: plan.yaml, recipe.yaml and converted/, all of one run; and a place for what fits in none.

What can be found out before anything trains is found out then; and what was trained is not thrown away after.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from thesean import artifact
from thesean.converted import Converted
from thesean.errors import WriteError
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe
from thesean.scratch import named, scratch, telling
from thesean.write_file import mode_kept

_SLACK = 2**20  # bytes of all that is no weight


@dataclass(frozen=True, kw_only=True)
class Workdir:
    """`beside`: what is written together with the conversion."""

    conversion: Path
    beside: Mapping[Path, str]

    @staticmethod
    def prepare(folder: Any, plan: Plan, recipe: Recipe) -> Workdir:
        """Before anything trains. Raises WriteError, and ArtifactError for a folder that holds something else."""
        folder = named(folder)
        beside = {folder / "plan.yaml": plan.to_yaml(), folder / "recipe.yaml": recipe.to_yaml()}
        artifact.check_free(folder / "converted")
        with telling(folder, "workdir="):
            folder.mkdir(parents=True, exist_ok=True)
            for path in beside:
                mode_kept(path)
            with scratch(folder / "converted"):
                pass
        return Workdir(conversion=folder / "converted", beside=beside)

    def check_room(self, graph_module: fx.GraphModule) -> None:
        """Raises WriteError where a disk or a limit has no room for its weights."""
        tensors = {t.data_ptr(): t for t in (*graph_module.parameters(), *graph_module.buffers())}
        size = sum(t.nbytes for t in tensors.values()) + _SLACK
        with telling(self.conversion, "workdir="), scratch(self.conversion) as folder:
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size / 2**20:.0f} MiB are needed")
            with (folder / "made").open("wb") as file:
                file.truncate(size)  # takes no blocks, but is held against the limit of a file's size

    def keep(self, converted: Converted) -> str:
        """Save, with the plan as it was executed. Returns what to tell of a failure, "" where there was none."""
        executed = {self.conversion.parent / "plan.yaml": converted.plan.to_yaml()}
        return keep(converted, self.conversion, {**self.beside, **executed})


def keep(converted: Converted, folder: Path, beside: Mapping[Path, str] | None = None) -> str:
    """Save a conversion or, where that fails, keep it elsewhere. Returns what to tell of it, "" for nothing."""
    found = artifact.Artifact(
        graph_module=converted.module, signature=converted.signature, plan=converted.plan, report=converted.report
    )
    try:
        artifact.save(found, folder, beside)
        return ""
    except Exception as error:  # whatever it is, what was trained is worth more
        return f"not saved: {str(error).removesuffix('.')}. {_rescued(found, folder, isinstance(error, WriteError))}"


def _rescued(found: artifact.Artifact, folder: Path, whole: bool) -> str:
    """Keep it in another place, and say how to get at it. `whole`: it is the place that was at fault."""
    for parent in _places(folder) if whole else ():
        with suppress(Exception), _new_folder(parent) as place:
            saved = artifact.save(found, place / "converted")
            return f"It was saved elsewhere: thesean.load({str(saved)!r})."
    for parent in _places(folder):
        with suppress(Exception), _new_folder(parent) as place:
            return f"Its weights are in {artifact.save_weights(found.graph_module, place / 'weights.safetensors')}."
    return "No other place was found: what compile returned is all there is of it; save it."


def _places(folder: Path) -> tuple[Path, ...]:
    """Beside the folder that was meant, for temporary files, at home, and where we are."""
    return folder.parent, Path(tempfile.gettempdir()), Path(os.path.expanduser("~")), Path.cwd()


@contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """Gone again after an error."""
    place = Path(tempfile.mkdtemp(prefix="thesean-kept-", dir=parent))
    try:
        yield place
    except BaseException:
        with suppress(OSError):
            place.rmdir()
        raise
