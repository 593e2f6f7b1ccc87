"""What every test starts from: a fixed global seed, two threads, and hypothesis examples that never change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "sbpatch", deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sbpatch")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Tests draw from the global generator; none sees what another one drew."""
    torch.manual_seed(0)
