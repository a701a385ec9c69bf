"""More weights than one protobuf message holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.passes.capture.capture import capture
from thesean.scratch import file_sha256

ROWS, WIDTH = 8200, 65536  # 2.15 GB


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.zeros(ROWS, WIDTH)  # pages that nobody writes to take no memory
        weight[0], weight[-1] = 1, 2
        self.rows = nn.Embedding.from_pretrained(weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.rows(ids)
        return found.mean(-1)


def memory() -> dict[str, int]:
    """What this process holds and has held at most, in bytes; nothing where Linux doesn't tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {words[0].rstrip(":"): 1024 * int(words[1]) for line in lines if (words := line.split())[-1:] == ["kB"]}


@pytest.mark.slow
def test_a_network_above_two_gigabytes_is_written_and_runs(tmp_path):
    guide = capture(Table().eval(), {"ids": torch.randint(0, ROWS, (2, 3))})
    before = memory()
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx", stateful=False)
    try:
        assert report.weights is not None
        if before:  # the network's own weights take none here: half of their size is 1.5 times of them
            now, most = before["VmRSS"], before["VmHWM"]
            assert memory()["VmHWM"] < max(most, now + ROWS * WIDTH * 4 // 2)
        assert report.bytes > 2**31
        assert (tmp_path / "m.onnx").stat().st_size < 10_000
        session = Session(report.path)
        assert session.metadata["thesean.weights_sha256"] == file_sha256(report.weights)
        outputs, _ = session.run({"ids": np.array([[0, 1, ROWS - 1]])})
        assert next(iter(outputs.values())).tolist() == [[1.0, 0.0, 2.0]]
    finally:
        for path in tmp_path.iterdir():  # pytest keeps folders of earlier runs
            path.unlink()
