"""One torch thread for all tests: on shared cores a second one is slower by up to ten times."""

import logging
import os

import torch
from hypothesis import settings

from tests.kept_captures import capture
from thesean import compiler

torch.set_num_threads(1)

# pytest hands a handler to each logger that does not propagate; with one torch writes down each step of its traces.
logging.getLogger("torch.__trace").propagate = True

# In CI the same examples each time: a rare one that fails there would stop a change that has nothing to do with it.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

compiler.capture = capture
