"""One thread for each of several workers, and Hypothesis's profiles.

The profiles: an ordinary one, and `--hypothesis-profile=thorough` for a long search.
"""

import os

import torch
from hypothesis import HealthCheck, settings

# Under `pytest -n 2`: more threads than cores wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile(
    "ordinary", deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("ordinary"), max_examples=10_000)
settings.load_profile("ordinary")
