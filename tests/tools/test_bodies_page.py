"""The page of bodies has a row for each family, which says what is measured."""

from pathlib import Path

import pytest
import torch

from tools.bodies_page import FAMILIES, Row, exported

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "bodies.md"


def cells():
    lines = PAGE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "`" in line]
    return {row[0]: row for row in rows if len(row) == 10}


def test_page__has_every_family_and_every_export_is_read_back():
    assert list(cells()) == [family.name for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES[::4], ids=lambda family: family.architecture)
def test_page__says_what_is_measured(family, tmp_path):
    torch.manual_seed(0)
    measured = [*vars(Row.measured(family)).values(), exported(family, "timm", tmp_path)]
    assert cells()[family.name][:9] == measured
