"""The documentation says what is true: its commands parse, its links lead somewhere."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from radio_distill.config import describe
from stages.arguments import Parser
from stages.cli import COMMANDS
from stages.cli import main as cli
from tools import fields_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [path for name in ("examples", "upsamplers") for path in (ROOT / name).rglob("*.md")]


def commands() -> list[tuple[str, str]]:
    """Every ``radio-distill …`` line of a code block, continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("radio-distill "):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands__exist_with_their_arguments(page, line):
    _, name, *arguments = shlex.split(line, comments=True)
    module = import_module(COMMANDS[name][0])
    parser = Parser(prog=name)
    module.add_arguments(parser)
    takes_fields = getattr(module, "TAKES_FIELDS", False)
    parsed, fields = parser.parse(arguments, takes_fields)
    assert isinstance(parsed, argparse.Namespace)
    known = {re.sub(r"\.(NAME|N)\b", "", row[0]).rpartition(".")[2] for row in describe()}
    for field in fields:
        assert field.partition("=")[0].rpartition(".")[2] in known, field


def test_commands__the_readme_shows_most_of_them():
    shown = {shlex.split(line)[1] for page, line in commands() if page == "README.md"}
    assert set(COMMANDS) - shown <= {"demo", "fields"}


def test_fields_page__is_what_the_tool_prints(capsys):
    assert fields_page.main() == 0
    assert (ROOT / "docs" / "reference" / "fields.md").read_text() == capsys.readouterr().out


def anchors(page: Path) -> set[str]:
    """Return the anchors that a host makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links__lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" not in target:
            path = (page.parent / target) if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_teachers__the_page_has_every_option_and_source():
    from teachers import FIELDS, SOURCES

    page = (ROOT / "docs" / "teachers.md").read_text()
    options = [key for place in SOURCES.values() for key in import_module(place).ARGUMENTS]
    for name in [*FIELDS, *SOURCES, *options]:
        assert f"`{name}`" in page, name


def test_list__shows_every_option_of_every_source(capsys):
    from teachers import FIELDS, SOURCES

    assert cli(["list", "sources"]) == 0
    shown = capsys.readouterr().out
    for name, place in SOURCES.items():
        assert name in shown
        for option in import_module(place).ARGUMENTS:
            assert option in shown
    assert all(option in shown for option in FIELDS)


def test_teachers__the_examples_are_recipes():
    import yaml

    from radio_distill.config import TeacherConfig, build
    from teachers import FIELDS, SOURCES

    page = (ROOT / "docs" / "teachers.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    teachers = yaml.safe_load(block)["teachers"]
    assert len(teachers) > 5
    for name, values in teachers.items():
        config = build(TeacherConfig, values, f"teachers.{name}")
        known = {*FIELDS, *import_module(SOURCES[config.preset]).ARGUMENTS}
        assert set(config.options) <= known
