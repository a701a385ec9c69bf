"""Commands that change nothing: what a conversion cost, how alike two models are, what there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import thesean
from thesean.cli.options import Debug, Flatten, check_writable
from thesean.cli.telling import one_line_errors
from thesean.cli.words import ArgumentError, load_data, load_guide, load_object
from thesean.converted import is_saved
from thesean.deploy.describe_file import describe_file, encoder_of
from thesean.deploy.loaded import require
from thesean.deploy.onnx_file import PLAN, REPORT
from thesean.load_artifact import read_plan_and_report
from thesean.passes.plan.plan import Plan
from thesean.replace_folder import reading
from thesean.report import markdown_table, read_report, render
from thesean.report.comparison import check_plot
from thesean.report.conversion import ConversionReport
from thesean.report.report_json import report_rows
from thesean.similarity import get_measure
from thesean.targets import get_family
from thesean.targets.shared.describe_options import describe_options
from thesean.with_guide import with_guide


def report(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE.json", help="A saved conversion, or a report.json.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, with its provenance.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write a page, with DIR.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="With --html and --guide: batches on which both are compared."),
    ] = None,
    guide: Annotated[
        str | None, typer.Option(metavar="GUIDE", help="With --html: the model that was converted, as in `convert`.")
    ] = None,
    decode: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="With --html: decode(tokens) -> text.")
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE.onnx", help="With --html: the exported file, whose states it names.")
    ] = None,
    trade_offs: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="With --html: what `thesean bench --out` wrote, quality over latency."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print what a conversion became and what it cost, stage by stage. No weights are read, but for --html.

    \b
    Examples:
      thesean report build/rnn
      thesean report build/rnn --html report.html
      thesean report build/rnn --html report.html --guide models.gpt:make --data texts:held_out --onnx rnn.onnx
      thesean report build/demo/report.json --markdown
    """
    with one_line_errors(debug):
        check_writable("--html", html)
        wanted = {"--data": data, "--guide": guide, "--decode": decode, "--onnx": onnx, "--trade-offs": trade_offs}
        if html is None and (given := [name for name, value in wanted.items() if value is not None]):
            raise ArgumentError(f"{given[0]} is for the page: give --html FILE.html too.")
        if html is not None and not path.is_dir():
            raise ArgumentError(f"--html: expected the folder of a saved conversion, found {path}.")
        if path.is_dir():
            if markdown:
                raise ArgumentError(f"--markdown: expected a report.json of several models, found the folder {path}.")
            plan, told = reading(path, read_plan_and_report)
            typer.echo(f"{plan}\n\n{told}")
            if html is not None:
                _write_page(path, html, data, guide, decode, {"onnx": onnx, "trade_offs": trade_offs})
            return
        found = read_report(path)
        if markdown:
            typer.echo(markdown_table(found))
        else:
            Console().print(render(report_rows(found), metric_name=str(found.get("metric_name", "metric"))))


def _write_page(
    folder: Path, html: Path, data: str | None, guide: str | None, decode: str | None, rest: dict[str, Any]
) -> None:
    converted = thesean.load(folder)
    batches = None if data is None else load_data(data, "--data")
    if guide is not None:
        converted = with_guide(converted, load_guide(guide), data=batches)
    reader = None if decode is None else load_object(decode, "--decode", call=False)
    converted.report.html(html, data=batches, decode=reader, **rest)
    typer.echo(f"wrote {html}")


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="An exported file, or anybody's ONNX model.")],
    debug: Debug = False,
) -> None:
    """Print what an ONNX file takes and gives, its states, its plan and what was checked; of a decoder's file its
    encoder's too. No weights are read.

    \b
    Example:
      thesean inspect build/rnn.onnx
    """
    with one_line_errors(debug):
        require("onnx")
        text, told = describe_file(path)
        typer.echo(text)
        if (beside := encoder_of(path, told)) is not None:
            typer.echo(f"\n{describe_file(beside)[0]}")
        if PLAN in told:
            typer.echo(f"\n{Plan.from_yaml(told[PLAN])}")
        if REPORT in told:
            typer.echo(f"\n{ConversionReport.from_json(told[REPORT])}")


def compare(
    model_a: Annotated[
        str, typer.Argument(metavar="MODEL_A", help="As GUIDE of the other commands, or a saved conversion's folder.")
    ],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B", help="The model to compare it with, likewise.")],
    data: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="Batches that both models take; one pass.")],
    measure: Annotated[str, typer.Option(help="cka, or another of thesean.measures().")] = "cka",
    layers_a: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Modules of MODEL_A (default: its blocks); * in a level, ** over levels."),
    ] = None,
    layers_b: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Modules of MODEL_B.")] = None,
    flatten: Annotated[
        Flatten, typer.Option(help="What a row is: an example, or each of its tokens.")
    ] = Flatten.example,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the matrix.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw a heatmap.")] = None,
    debug: Debug = False,
) -> None:
    """Print how similar each layer of one model is to each of another.

    \b
    Examples:
      thesean compare models.gpt:make models.gpt:small --data texts:batches --plot heatmap.png
      thesean compare ./bert ./student --data texts:batches --flatten token \\
        --layers-a 'encoder.layer.*' --layers-b 'encoder.layer.*' --json cka.json
      thesean compare models.gpt:make build/rnn --data texts:batches --flatten token
    """
    with one_line_errors(debug):
        for option, path in (("--json", json), ("--plot", plot)):
            check_writable(option, path)
        if plot is not None:
            check_plot(plot)
        first, second = (thesean.load(word) if is_saved(word) else load_guide(word) for word in (model_a, model_b))
        found = thesean.compare(
            first,
            second,
            load_data(data, "--data"),
            measure,
            layers_a=layers_a or None,
            layers_b=layers_b or None,
            flatten=flatten.value,
        )
        typer.echo(str(found))
        if json is not None:
            typer.echo(f"wrote {found.to_json(json)}")
        if plot is not None:
            typer.echo(f"wrote {found.plot(plot)}")


def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Tell this one's options.")] = None,
    debug: Debug = False,
) -> None:
    """List the target architectures, or the options of one.

    \b
    Use one by its name, with options after a colon:
      thesean targets linear-attention
      thesean convert GUIDE --target gru --data texts:batches --out build/gru
      thesean convert GUIDE --target gru:width=256,scope=part --data texts:batches --out build/gru
    """
    with one_line_errors(debug):
        if name is None:
            _print("target", "what it is", thesean.targets())
            return
        family = get_family(name)
        typer.echo(f"{name}: {family.summary}\nreplaces: {family.scope}")
        if family.options.__doc__:
            typer.echo(" ".join(family.options.__doc__.split()))
        rows = {
            f"{o.name}={o.default}": f"{o.type}: {o.told}".removesuffix(": ") for o in describe_options(family.options)
        }
        if rows:
            _print("option", "what it takes", rows)


def measures(debug: Debug = False) -> None:
    """List the measures of similarity.

    \b
    Use one by its name:
      thesean compare models.gpt:make models.gpt:small --data texts:batches --measure dmnn
    """
    with one_line_errors(debug):
        _print("measure", "what it is", {name: get_measure(name).summary for name in thesean.measures()})


def _print(first: str, second: str, rows: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, style="bold", no_wrap=True)
    table.add_column(second)
    for name, told in sorted(rows.items()):
        table.add_row(escape(name), escape(told))  # a type's brackets are no markup
    Console().print(table)
