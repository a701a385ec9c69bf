"""One torch thread for all tests: on shared cores a second one is slower by up to ten times."""

import torch

torch.set_num_threads(1)
