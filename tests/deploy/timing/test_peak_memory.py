"""What a file takes while it runs, told by a process of its own; here also by this one, where its rules can be seen.

B batch, T time
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from thesean.deploy.timing import peak_memory
from thesean.deploy.timing.peak_memory import Footprint, footprints, main

resource = pytest.importorskip("resource")  # not on Windows

LARGE_MIB = 40
# a state of as many numbers as it had and as came in, and a sum over 10 million numbers that are all there at once
TEXT = f"""
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[B, T] x, float[B, P] state_in_h) => (float[B, 1] y, float[B, S] state_out_h) {{
    state_out_h = Concat <axis = 1> (state_in_h, x)
    size = Constant <value = int64[1] {{{LARGE_MIB * 2**18}}}> ()
    axes = Constant <value = int64[1] {{1}}> ()
    total = ReduceSum <keepdims = 1> (state_out_h, axes)
    many = ConstantOfShape <value = float[1] {{1.0}}> (size)
    raised = Add (many, total)
    y = ReduceMax <keepdims = 1> (raised, axes)
}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


@pytest.fixture(autouse=True)
def as_much_as_before() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def whole(time: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((1, time), np.float32), "state_in_h": np.zeros((1, 0), np.float32)}


def one(width: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.ones((1, width), np.float32)}


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")


def test_a_peak_counts_what_is_held_in_passing_and_states_are_those_after_the_whole(file: Path):
    short, long = footprints(file, [(whole(3), one()), (whole(1000), None)])
    assert short is not None
    assert long is not None
    assert (short.state_bytes, long.state_bytes) == (4 * 3, 4 * 1000)
    assert short.peak_mib is not None
    assert long.peak_mib is not None
    assert LARGE_MIB < short.peak_mib <= long.peak_mib < 5 * LARGE_MIB


def test_from_the_first_run_on_that_fails_nothing_is_known(file: Path):
    wrong = {"x": np.ones((1, 2), np.float32)}  # a state is missing
    assert [f is not None for f in footprints(file, [(whole(3), None), (wrong, None), (whole(3), None)])] == [
        True, False, False,
    ]  # fmt: skip


def test_a_step_reads_the_states_that_the_whole_left(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = [str(tmp_path / f"{n}.npz") for n in ("whole", "step")]
    np.savez(places[0], **whole(5))  # type: ignore[arg-type]
    np.savez(places[1], **one())  # type: ignore[arg-type]
    main(str(file), *places, places[0], "")
    lines = [Footprint(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert [line.state_bytes for line in lines] == [20, 20]
    if lines[0].peak_mib is not None:
        assert LARGE_MIB < lines[0].peak_mib < 5 * LARGE_MIB
    np.savez(places[1], **whole(2), other=np.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="other"):
        main(str(file), *places)


@needs_proc
def test_what_is_free_is_not_taken_whole():
    free = peak_memory._kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024
    held = peak_memory._kilobytes(Path("/proc/self/status"), "VmSize") * 1024
    peak_memory._leave_some()
    most, hardest = resource.getrlimit(resource.RLIMIT_AS)
    assert most - held == pytest.approx(0.6 * free, rel=0.05)
    assert hardest == resource.RLIM_INFINITY or hardest >= most


@needs_proc
def test_a_peak_is_in_mib_and_counts_anew():
    page = os.sysconf("SC_PAGE_SIZE")
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page / 2**20
    block = np.ones(LARGE_MIB * 2**17)  # 8 bytes each
    assert block.nbytes == LARGE_MIB * 2**20
    del block
    before = peak_memory._restart()
    assert before is not None
    assert before == pytest.approx(held, abs=LARGE_MIB / 4)
    block = np.ones(LARGE_MIB * 2**17)
    after = peak_memory._peak()
    assert after is not None
    assert after - before == pytest.approx(block.nbytes / 2**20, rel=0.25)


def test_where_no_file_tells_it_the_system_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    known = peak_memory._peak()
    assert known is not None
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "linux")
    found = peak_memory._peak()
    assert found is not None
    assert known * 0.9 < found < known * 10  # never counted anew
    monkeypatch.setattr(sys, "platform", "darwin")  # which tells bytes
    assert peak_memory._peak() == pytest.approx(found / 1024, rel=0.01)
