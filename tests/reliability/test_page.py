"""docs/reliability.md says how many cases each file of tests has; this counts them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny import ROOT

PAGE = ROOT / "docs" / "reliability.md"


class Collected:
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.cases = Counter(Path(item.fspath).name for item in session.items)


def test_the_page_has_the_number_of_cases(capsys):
    found = Collected()
    assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)], [found]) == 0
    page = PAGE.read_text(encoding="utf-8")
    rows = {row.split("`")[-2]: row for row in page.splitlines() if row.startswith("|") and "`test_" in row}
    for name, cases in found.cases.items():
        if name != Path(__file__).name:
            assert rows[name].endswith(f"| {cases:,} |"), f"{name} has {cases:,} cases"
