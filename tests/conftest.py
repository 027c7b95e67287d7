"""What every test shares: quiet threads, a fixed seed, the recorded data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Models in tests are tiny: more threads only wait for each other.
torch.set_num_threads(1)

# What a test decides must not depend on how busy the machine is.
settings.register_profile("house", deadline=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what this machine cannot run."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Recorded data: SPEECHLM_DATA, else ../shared/data beside the checkout."""
    path = Path(os.environ.get("SPEECHLM_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "manifest.tsv.gz").exists():
        pytest.skip(f"needs the recorded data; none in {path} (set SPEECHLM_DATA)")
    return path
