"""The table of docs/supported-models.md says of every timm family what happens to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import timm_coverage
from timm.models import list_modules

TEXT = (Path(__file__).parents[1] / "docs" / "supported-models.md").read_text(encoding="utf-8")
STATED = re.search(r"timm (\d+\.\d+\.\d+)", TEXT)
assert STATED is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(timm.__version__ != STATED[1], reason=f"the table is of timm {STATED[1]}"),
]


@pytest.mark.parametrize("family", list_modules())
def test_a_family(family):
    """Its rows in the table; or its name among those without attention."""
    stated = [line for line in TEXT.splitlines() if line.startswith(f"| {family} |")]
    assert [str(row) for row in timm_coverage.rows(family)] == stated
    without = re.search(timm_coverage.WITHOUT + "(.*)", TEXT)
    assert (family in re.findall(r"\w+", without[1])) == (not stated)
