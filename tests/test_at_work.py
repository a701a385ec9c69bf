"""Two processes at work in one folder would write over what each other keeps: the second one is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thesean import at_work
from thesean.errors import ResumeError

HOLDING = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("7 on another"), file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_works_until_it_leaves(tmp_path: Path):
    leave = at_work.occupy(tmp_path)
    with pytest.raises(ResumeError, match="this process is at work there"):
        at_work.occupy(tmp_path)
    leave()
    leave()  # whoever ends a run does, wherever it ended
    at_work.occupy(tmp_path)()


@pytest.mark.skipif(at_work.fcntl is None, reason="no locks")
def test_another_process_is_named_and_gone_when_it_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", HOLDING, str(tmp_path / at_work.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match=r"process 7 on another is at work there\. Wait"):
            at_work.occupy(tmp_path)
        other.kill()
    at_work.occupy(tmp_path)()


def test_where_nothing_can_be_locked_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(at_work, "fcntl", None)
    at_work.occupy(tmp_path)()
