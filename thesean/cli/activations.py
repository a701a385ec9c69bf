"""`thesean activations`: what the guide makes of data, written once for the runs that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import thesean
from thesean.cli.options import (
    Debug,
    ExampleInputs,
    FreeSizes,
    Grain,
    Guide,
    InputsOf,
    Keep,
    Merge,
    Parts,
    TargetParts,
    Targets,
    check_writable,
    loaded_arguments,
    planning_arguments,
    reading,
)
from thesean.cli.telling import one_line_errors
from thesean.cli.words import load_guide
from thesean.units import quantity


def activations(
    guide: Guide,
    data: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="Batches, as `convert` is given them.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder, or one that this wrote, which grows.")],
    target: Targets = None,
    example_inputs: ExampleInputs = None,
    inputs: InputsOf = None,
    dynamic: FreeSizes = None,
    parts: Parts = None,
    keep: Keep = None,
    granularity: Grain = None,
    merge: Merge = None,
    target_parts: TargetParts = None,
    debug: Debug = False,
) -> None:
    """Run the guide on data and keep what its parts read and give, for `convert --cache DIR`: no step runs it then.

    Target and parts are those of the conversion: they decide where parts end. A file a batch, named by the hash of what
    the guide read; a folder of another guide, or of other weights, is refused.

    \b
    Example:
      thesean activations models.gpt:make --data texts:batches --out activations
      thesean convert models.gpt:make --data texts:batches --out converted --cache activations
    """
    with one_line_errors(debug):
        check_writable("--out", out)
        chosen = planning_arguments(target, parts, keep, granularity, merge, target_parts, None, None)
        wanted = chosen.pop("target")
        chosen = {k: v for k, v in chosen.items() if k not in ("constraints", "candidates")}
        chosen |= reading(None, dynamic)
        model = load_guide(guide)
        chosen |= loaded_arguments(data, example_inputs, None, None, inputs)
        made = thesean.save_activations(model, out, wanted, **chosen)
        typer.echo(
            f"wrote {made.path}: {made.batches} batches, {made.new} of them new, {made.nodes} nodes each, "
            f"{quantity(made.bytes, 'B')}: thesean convert {guide} ... --cache {made.path}"
        )
