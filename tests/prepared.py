"""What is set once in a process that runs tests, before they are imported."""

import logging
import os

import torch
from hypothesis import settings

from tests.kept_captures import capture
from tests.kept_files import to_onnx
from thesean import compiler
from thesean.deploy import export
from thesean.deploy.timing import parts

torch.set_num_threads(1)

# pytest hands a handler to each logger that does not propagate; with one torch writes down each step of its traces.
logging.getLogger("torch.__trace").propagate = True

# In CI the same examples each time: a rare one that fails there would stop a change that has nothing to do with it.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

compiler.capture = capture
export.to_onnx = parts.to_onnx = to_onnx  # type: ignore[assignment]

if not torch.cuda.is_available():
    # For devices that may come, torch writes down the whole stack at each seed: here longer than many a test takes.
    setattr(torch, "manual_seed", torch.default_generator.manual_seed)  # noqa: B010
