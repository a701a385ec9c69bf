"""A model in one file, or with its weights beside it: whatever happens, the name holds a model with its own weights."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from thesean import scratch
from thesean.deploy import onnx_file
from thesean.deploy.onnx_file import check_weights, draft, metadata, weights_of
from thesean.deploy.session import Session
from thesean.errors import ExportError, WriteError
from thesean.scratch import file_sha256

LARGE = 1000  # numbers, so that they don't stay inside


def model(value: float) -> ir.Model:
    """y = x + weights."""
    weights = onnx.numpy_helper.from_array(np.full((LARGE,), value, np.float32), "weights")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", LARGE]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "weights"], ["y"])], "g", [x], [y], [weights])
    opsets = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def write(path: Path, value: float, beside: bool | None = None) -> None:
    with draft(path) as made:
        made.write(model(value), beside)
        made.publish()


def value_of(path: Path) -> float:
    outputs, _ = Session(path).run({"x": np.zeros((1, LARGE), np.float32)})
    return float(outputs["y"][0, 0])


def test_small_weights_are_inside_and_large_ones_beside(tmp_path, monkeypatch):
    write(tmp_path / "m.onnx", 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    monkeypatch.setattr(onnx_file, "LIMIT", 4 * LARGE - 1)
    write(tmp_path / "n.onnx", 3.0)
    weights = weights_of(tmp_path / "n.onnx")
    assert weights is not None
    assert weights.stat().st_size == 4 * LARGE
    assert (tmp_path / "n.onnx").stat().st_size < LARGE
    assert [value_of(tmp_path / name) for name in ("m.onnx", "n.onnx")] == [2.0, 3.0]


def test_folders_that_are_missing_are_made(tmp_path):
    write(tmp_path / "of" / "mine" / "m.onnx", 2.0)
    assert value_of(tmp_path / "of" / "mine" / "m.onnx") == 2.0


def test_writing_over_a_model_leaves_no_weights_of_the_old_one(tmp_path):
    for value, beside in ((1.0, True), (2.0, True), (3.0, False)):
        write(tmp_path / "m.onnx", value, beside)
        assert value_of(tmp_path / "m.onnx") == value
        assert len(list(tmp_path.iterdir())) == 1 + beside


@pytest.mark.parametrize("when", ["the weights are written", "the model is written", "it takes its name"])
def test_what_is_interrupted_leaves_the_old_model_with_its_weights_and_nothing_else(when, tmp_path, monkeypatch):
    write(tmp_path / "m.onnx", 1.0, beside=True)
    before = sorted(tmp_path.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    places = {
        "the weights are written": (ir.external_data, "unload_from_model"),
        "the model is written": (Path, "write_bytes"),
        "it takes its name": (onnx_file.os, "replace"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*places[when], full)
        with pytest.raises(WriteError, match=r"can't write .*m\.onnx: No space left"):
            write(tmp_path / "m.onnx", 2.0, beside=True)
    assert sorted(tmp_path.iterdir()) == before
    assert value_of(tmp_path / "m.onnx") == 1.0


def test_weights_that_are_missing_or_changed_are_told_by_name(tmp_path):
    write(tmp_path / "m.onnx", 1.0, beside=True)
    weights = weights_of(tmp_path / "m.onnx")
    assert weights is not None
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ExportError, match=rf"{weights.name} was changed since it was written"):
        Session(tmp_path / "m.onnx")
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=rf"{weights.name} was changed since it was written"):
        Session(tmp_path / "m.onnx")
    weights.unlink()
    with pytest.raises(ExportError, match=rf"its weights, {weights.name}, are not beside it\. Move both"):
        Session(tmp_path / "m.onnx")


def test_metadata_name_no_weights_outside_of_the_folder(tmp_path):
    """Another maker's file must not make us read, or remove, what it likes."""
    (tmp_path / "precious").write_bytes(b"here")
    folder = tmp_path / "models"
    folder.mkdir()
    stranger = model(1.0)
    stranger.metadata_props[onnx_file.WEIGHTS] = "../precious"
    stranger.metadata_props[onnx_file.WEIGHTS_HASH] = file_sha256(tmp_path / "precious")
    ir.save(stranger, folder / "m.onnx")
    assert weights_of(folder / "m.onnx") is None
    with pytest.raises(ExportError, match=r"precious, are not beside it"):
        check_weights(folder / "m.onnx", metadata(folder / "m.onnx"))
    write(folder / "m.onnx", 2.0)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("named", ["notes.txt", "m.onnx.notes.weights"])
def test_metadata_let_us_remove_no_file_of_another_kind(named, tmp_path):
    (tmp_path / named).write_bytes(b"mine")
    stranger = model(1.0)
    stranger.metadata_props[onnx_file.WEIGHTS] = named
    ir.save(stranger, tmp_path / "m.onnx")
    write(tmp_path / "m.onnx", 2.0)
    assert (tmp_path / named).read_bytes() == b"mine"


def test_weights_that_a_copy_of_the_model_needs_stay(tmp_path):
    write(tmp_path / "m.onnx", 1.0, beside=True)
    shutil.copy(tmp_path / "m.onnx", tmp_path / "copy.onnx")
    write(tmp_path / "m.onnx", 2.0, beside=True)
    assert [value_of(tmp_path / name) for name in ("copy.onnx", "m.onnx")] == [1.0, 2.0]
    (tmp_path / "copy.onnx").unlink()
    write(tmp_path / "m.onnx", 3.0)
    assert value_of(tmp_path / "m.onnx") == 3.0


def test_files_beside_it_that_hold_nothing_or_can_not_be_read_say_nothing_of_weights(tmp_path):
    """Weights that such a file may need stay; an empty one needs none."""
    write(tmp_path / "m.onnx", 1.0, beside=True)
    (weights,) = tmp_path.glob("*.weights")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "locked.onnx").write_bytes(b"?")
    (tmp_path / "locked.onnx").chmod(0)
    unreadable = not os.access(tmp_path / "locked.onnx", os.R_OK)  # root may read all
    write(tmp_path / "m.onnx", 2.0, beside=True)
    assert weights.exists() == unreadable
    assert value_of(tmp_path / "m.onnx") == 2.0


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks")
@pytest.mark.parametrize("said", [None, b"\xff\xfe"])
def test_weights_go_whatever_another_export_has_yet_said_of_its_own(said, tmp_path):
    write(tmp_path / "m.onnx", 1.0, beside=True)
    with draft(tmp_path / "m.onnx") as other:
        if said is not None:
            (other.path.parent / "moving").write_bytes(said)
        write(tmp_path / "m.onnx", 2.0, beside=True)
        assert value_of(tmp_path / "m.onnx") == 2.0
        assert len(list(tmp_path.glob("*.weights"))) == 1


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks")
def test_weights_that_another_export_is_about_to_give_the_model_stay(tmp_path):
    write(tmp_path / "m.onnx", 1.0, beside=True)
    moved = tmp_path / "m.onnx.01234567.weights"
    with draft(tmp_path / "m.onnx") as other:
        (other.path.parent / "moving").write_text(moved.name, encoding="utf-8")
        moved.write_bytes(b"others")
        write(tmp_path / "m.onnx", 2.0, beside=True)
        assert moved.read_bytes() == b"others"
    write(tmp_path / "m.onnx", 3.0, beside=True)
    assert not moved.exists()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="links")
def test_a_link_is_followed_and_its_target_has_the_weights_beside_it(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m.onnx").symlink_to(Path("disk") / "m.onnx")
    for value in (1.0, 2.0):
        write(tmp_path / "m.onnx", value, beside=True)
        assert value_of(tmp_path / "m.onnx") == value_of(tmp_path / "disk" / "m.onnx") == value
    assert (tmp_path / "m.onnx").is_symlink()
    assert len(list((tmp_path / "disk").iterdir())) == 2


def test_a_name_that_fills_what_a_file_system_takes_is_taken(tmp_path):
    path = tmp_path / ("x" * 250 + ".onnx")
    write(path, 1.0, beside=True)
    assert value_of(path) == 1.0


class Killed(BaseException):
    """Nothing that is left to do is done."""


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks")
@pytest.mark.parametrize("move", ["weights", "model", "removal"])
def test_what_was_killed_at_any_move_is_cleaned_by_the_next_export(move, tmp_path, monkeypatch):
    write(tmp_path / "m.onnx", 1.0, beside=True)

    def killed(*_: object) -> Any:
        raise Killed

    with monkeypatch.context() as patched:
        places = {"weights": (onnx_file.shutil, "move"), "model": (onnx_file.os, "replace")}
        patched.setattr(onnx_file, "_remove_weights", lambda name, own=None: own and killed())
        patched.setattr(*places.get(move, (onnx_file, "_mentions")), killed)
        patched.setattr(Path, "unlink", killed)
        patched.setattr(scratch, "remove", lambda _: None)
        with pytest.raises(Killed):
            write(tmp_path / "m.onnx", 2.0, beside=True)
    assert value_of(tmp_path / "m.onnx") == (2.0 if move == "removal" else 1.0)
    assert len(list(tmp_path.iterdir())) > 2
    write(tmp_path / "m.onnx", 3.0, beside=True)
    assert value_of(tmp_path / "m.onnx") == 3.0
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_told_later_is_in_the_metadata_with_what_was_there(tmp_path):
    with draft(tmp_path / "m.onnx") as made:
        written = model(1.0)
        written.metadata_props["first"] = "1"
        made.write(written)
        made.tell({"second": "zwei"})
        made.publish()
    assert metadata(tmp_path / "m.onnx") == {"first": "1", "second": "zwei"}
    assert Session(tmp_path / "m.onnx").metadata == {"first": "1", "second": "zwei"}
    assert value_of(tmp_path / "m.onnx") == 1.0


@pytest.mark.parametrize("content", [b"", b"text", b"\x08\x0a"])
def test_what_is_no_model_is_told(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx is no ONNX model"):
        metadata(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"can't read .*none\.onnx: No such file"):
        metadata(tmp_path / "none.onnx")
