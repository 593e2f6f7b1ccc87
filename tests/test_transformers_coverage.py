"""The table of transformers families in docs/supported-models.md says what happens."""

from __future__ import annotations

import pytest
from transformers_coverage import FAMILIES, HEAD, documented, rows


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.class_name)
def test_documented_row_is_what_happens(family):
    found = rows(family)
    assert found
    assert found == [
        row for row in documented().splitlines() if row.startswith(f"| {family.name} | `{family.class_name}` |")
    ]


def test_table_has_no_other_rows():
    rest = documented().removeprefix(HEAD + "\n").splitlines()
    assert {tuple(row.split(" | ")[:2]) for row in rest} == {(f"| {f.name}", f"`{f.class_name}`") for f in FAMILIES}


def test_only_masks_biases_and_windows_stay_exact():
    """Plain attention over the image's or the text's own tokens is patchable, in every family that has it."""
    exact = {row.split(" | ")[0].strip("| ") for row in documented().splitlines() if " exact: " in row}
    patchable = {row.split(" | ")[0].strip("| ") for row in documented().splitlines() if row.endswith("patchable |")}
    assert exact - patchable == {"BEiT", "Mistral", "Swin", "T5"}
