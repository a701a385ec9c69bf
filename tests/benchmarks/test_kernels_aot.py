"""The ahead-of-time check of `make kernels-check` reports what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import kernels_aot

GOOD = kernels_aot.Compiled(
    kernel="cka: pair",
    arch="sm90",
    dtype="float32",
    variant="",
    warps=4,
    registers=168,
    spilled_bytes=0,
    shared_bytes=49152,
    matrix_instruction="wgmma.mma_async",
    claims_matrix=True,
    seconds=1.0,
)


def test_a_kernel_within_the_limits_has_no_faults():
    assert GOOD.faults() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"registers": 256}, "256 registers, expected 1 to 255"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, limit 232448"),
        ({"matrix_instruction": None}, "no tensor-core instruction"),
    ],
)
def test_each_limit_is_a_fault_of_its_own(change, fault):
    assert replace(GOOD, **change).faults() == [fault]


def test_every_table_entry_is_run():
    checked = {(op, dtype) for op, dtype, _, _ in kernels_aot.runs()}
    assert checked == {(op, dtype) for op, _, dtype in kernels_aot.launches.TABLE}
