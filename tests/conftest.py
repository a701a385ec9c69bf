"""One torch thread for all tests: on shared cores a second one is slower by up to ten times."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)

# In CI the same examples each time: a rare one that fails there would stop a change that has nothing to do with it.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
