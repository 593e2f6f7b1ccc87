"""What every test starts from: a fixed global seed, an own cost table, hypothesis examples that never change; and their order.

Where there is no GPU, Triton's kernels run in its interpreter, which has to be said before triton is first imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "sbpatch", deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sbpatch")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(2 if WORKERS == 1 else 1)  # side by side, a second thread of each costs more than it gives
if WORKERS > 1:
    # Nor do the commands that tests start take more: threads that wait for each other make their timings absurd.
    os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Files that take longest, first: pytest-xdist hands out whole files, and its workers then end together.
LONGEST = (
    "test_docs", "test_kills", "test_kernels", "test_demo", "test_processes", "test_cli", "test_export",
    "test_real_checkpoints", "test_timm_coverage", "test_calibrate", "test_finetune", "test_cifar10_model", "test_compare",
    "test_compiled", "test_fuzz", "test_disk", "test_transformers_models", "test_interface", "test_training_recipes",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist, which would begin with the files of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cost table, nor do the processes it starts; downloaded models are found as before."""
    before = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ.get("HF_HOME") or f"{before}/huggingface")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Tests draw from the global generator; none sees what another one drew."""
    torch.manual_seed(0)
