"""Names that can't be written or read, given to everything that writes or reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import thesean
from benchmarks.hostility.guides import Blocks, seeded, vectors
from benchmarks.hostility.saved import converted
from benchmarks.hostility.trial import MINE, Call, Inputs, check, only_typed
from thesean.deploy.onnx_file import draft
from thesean.passes.graph.dump import dumping
from thesean.report.report_json import read_report, write_report

Writer = Callable[[Any], Any]


def plan() -> thesean.Plan:
    return converted().plan


def comparison() -> thesean.Comparison:
    return thesean.Comparison(
        measure="cka", estimator="all", name_a="a", name_b="b", layers_a=("x",), layers_b=("y",),
        matrix=torch.ones(1, 1), examples=4,
    )  # fmt: skip


def onnx_file(path: Any, value: float = 1.0) -> None:
    """What an export ends with, without what it begins with: a model and its weights beside it."""
    import onnx
    import onnx_ir as ir

    weights = onnx.numpy_helper.from_array(np.full((1000,), value, np.float32), "weights")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 1000]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "weights"], ["y"])], "g", [x], [y], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with draft(path) as made:
        made.write(ir.from_proto(model), beside=True)
        made.publish()


def dumped(path: Any) -> None:
    with dumping(path):
        pass


# By what they write: a file of that ending, or a folder.
FILES: dict[str, tuple[str, Writer]] = {
    "a plan": (".yaml", lambda path: plan().to_yaml(path)),
    "a recipe": (".yaml", lambda path: thesean.Recipe.named("fast").to_yaml(path)),
    "a drawing": (".svg", lambda path: plan().draw(path)),
    "a picture": (".png", lambda path: plan().draw(path)),
    "a report": (".json", lambda path: write_report(path, [])),
    "a comparison": (".json", lambda path: comparison().to_json(path)),
    "a heatmap": (".png", lambda path: comparison().plot(path)),
    "an ONNX file": (".onnx", onnx_file),
}
FOLDERS: dict[str, Writer] = {
    "a conversion": lambda path: converted().save(path),
    "graphs": dumped,
}


def hostile_names(ending: str) -> dict[str, Any]:
    return {
        "a name of 300 letters": "x" * 300 + ending,
        "a name of 5,000 letters": "/".join(["x" * 99] * 50) * 2 + ending,
        "a NUL in the name": f"a\0b{ending}",
        "a name that is no text": f"\ud800{ending}",
        "a name below a file": f"{MINE}/x{ending}",
        "a name below a link to itself": f"loop/x{ending}",
        "a link to itself": f"loop{ending}",
        "bytes for a name": b"x",
        "a number for a name": 7,
        "no name": None,
        "a list for a name": ["x" + ending],
        "a name in /proc": f"/proc/self/x{ending}",
    }


def hostile(writer: Writer, name: Any, ending: str) -> Call:
    def calling(folder: Path) -> None:
        for link in {"loop", f"loop{ending}"}:
            (folder / link).symlink_to(link)
        before = sorted(p.name for p in folder.iterdir())
        try:
            writer(name)
        finally:
            check(sorted(p.name for p in folder.iterdir()) == before, "something was left behind")

    return only_typed(calling)


def over_a_folder(writer: Writer, ending: str) -> Call:
    def calling(folder: Path) -> None:
        (folder / f"taken{ending}").mkdir()
        (folder / f"taken{ending}" / MINE).write_text("mine")
        try:
            writer(f"taken{ending}")
        finally:
            check((folder / f"taken{ending}" / MINE).read_text() == "mine", "the folder's content is gone")

    return only_typed(calling)


def through_a_link(writer: Writer, ending: str) -> Call:
    def calling(folder: Path) -> None:
        (folder / "disk").mkdir()
        link = folder / f"link{ending}"
        link.symlink_to(Path("disk") / f"x{ending}")
        for _ in range(2):
            writer(link.name)
            check(link.is_symlink() and (folder / "disk" / f"x{ending}").exists(), "the link was replaced")

    return calling


def into_a_full_device(folder: Path) -> None:
    plan().to_yaml("/dev/full")


def over_another_programs_folder(folder: Path) -> None:
    (folder / "graph.json").write_text('{"nodes": [], "edges": []}')
    converted().save(folder)


def over_a_conversion_with_more_in_it(folder: Path) -> None:
    saved = converted().save(folder / "saved")
    (saved / MINE).write_text("mine")
    (saved / "thesis").mkdir()
    (saved / "thesis" / MINE).write_text("mine")
    thesean.load(converted(seed=1).save(saved))
    for place in (saved, saved / "thesis"):
        check((place / MINE).read_text() == "mine", "the user's files are gone")


def over_a_strangers_model(folder: Path) -> None:
    """One that says that the user's notes are its weights."""
    import onnx

    onnx_file("m.onnx")
    model = onnx.load("m.onnx", load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "thesean.weights":
            entry.value = MINE
    onnx.save(model, "m.onnx")
    onnx_file("m.onnx", 2.0)


READ: dict[str, Callable[[Any], Any]] = {
    "load": thesean.load,
    "Plan.from_yaml": thesean.Plan.from_yaml,
    "Recipe.from_yaml": thesean.Recipe.from_yaml,
    "read_report": read_report,
}


def read_names() -> dict[str, Any]:
    return {
        "a folder without anything": "empty",
        "the user's notes": MINE,
        "a name that is not there": "none",
        "a NUL in the name": "a\0b",
        "a name of 300 letters": "x" * 300,
        "a link to itself": "loop",
        "a number": 7,
        "None": None,
        "/dev/null": "/dev/null",
        "bytes": b"x",
        "binary": "binary",
    }


def reads(read: Callable[[Any], Any], name: Any) -> Call:
    def calling(folder: Path) -> None:
        (folder / "empty").mkdir()
        (folder / "loop").symlink_to("loop")
        (folder / "binary").write_bytes(bytes(range(256)))
        read(name)

    return only_typed(calling)


def edited(*arguments: Any) -> Call:
    return lambda folder: plan().edit(*arguments)


def compared(**arguments: Any) -> Call:
    def calling(folder: Path) -> None:
        given: dict[str, Any] = {"data": vectors(), "measure": "cka", **arguments}
        models = given.pop("models", (seeded(Blocks), seeded(Blocks)))
        found = thesean.compare(*models, **given)
        check(found.matrix.isfinite().any(), "a comparison without a number")

    return calling


MORE: Inputs = {
    "a plan into a full device": only_typed(into_a_full_device),
    "a conversion over another program's graph.json": only_typed(over_another_programs_folder),
    "a conversion over one with the user's files in it": over_a_conversion_with_more_in_it,
    "an ONNX file over a stranger's, which names the notes as its weights": over_a_strangers_model,
    "a plan edited by a glob without a match": only_typed(edited("none.*", "keep")),
    "a plan edited to an unknown target": only_typed(edited("blocks.0", "narow")),
    "a plan edited to None": only_typed(edited("blocks.0", None)),
    "a plan edited by a number": only_typed(edited(3, "keep")),
    "the target of a part that is not there": only_typed(lambda folder: plan().target_of("none")),
    "a drawing without an ending": only_typed(lambda folder: plan().draw("x")),
    "a drawing in another format": only_typed(lambda folder: plan().draw("x.gif")),
    "a heatmap in another format": only_typed(lambda folder: comparison().plot("x.xyz")),
    "a comparison by an unknown measure": only_typed(compared(measure="kca")),
    "a comparison of None": only_typed(compared(models=(None, seeded(Blocks)))),
    "a comparison without data": only_typed(compared(data=[])),
    "a comparison on None": only_typed(compared(data=None)),
    "a comparison on strings": only_typed(compared(data=["x"])),
    "a comparison on an empty batch": only_typed(compared(data=[torch.zeros(0, 6, 8)])),
    "a comparison on another width": only_typed(compared(data=[torch.zeros(4, 6, 9)])),
    "a comparison on NaN": only_typed(compared(data=[x * float("nan") for x in vectors()])),
    "a target that is no family": only_typed(lambda folder: thesean.register(os)),  # type: ignore[arg-type]
    "a target of a number": only_typed(lambda folder: thesean.Target(3)),  # type: ignore[arg-type]
}


def _inputs() -> dict[str, Call]:
    found: dict[str, Call] = {}
    for what, (ending, writer) in FILES.items():
        for told, name in hostile_names(ending).items():
            if what in ("a plan", "a recipe") and name is None:
                continue  # text alone
            found[f"{what} into {told}"] = hostile(writer, name, ending)
        found[f"{what} over a folder"] = over_a_folder(writer, ending)
        found[f"{what} through a link"] = through_a_link(writer, ending)
    for what, writer in FOLDERS.items():
        for told, name in hostile_names("").items():
            if what == "graphs" and name is None:
                continue  # no graphs
            found[f"{what} into {told}"] = hostile(writer, name, "")
    found["a conversion over a folder"] = over_a_folder(FOLDERS["a conversion"], "")
    found["a conversion through a link"] = through_a_link(FOLDERS["a conversion"], "")
    for what, read in READ.items():
        for told, name in read_names().items():
            found[f"{what} of {told}"] = reads(read, name)
    return {**found, **MORE}


INPUTS: Inputs = _inputs()
