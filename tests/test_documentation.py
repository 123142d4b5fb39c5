"""The documentation says what is true: its commands parse, its links lead somewhere."""

import argparse
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from PIL import Image

from radio_distill.config import Recipe, check, describe_fields, load
from stages.arguments import Parser
from stages.cli import COMMANDS, module_of
from stages.cli import main as cli
from stages.recipes import add_stage_arguments
from tools import fields_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [path for name in ("examples", "upsamplers") for path in (ROOT / name).rglob("*.md")]


Block = tuple[Path, str, str]
"""Page, language and text of a block of code."""


def blocks(*languages: str) -> list[Block]:
    return [
        (page, language, text)
        for page in PAGES
        for language, text in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)
        if language in languages
    ]


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value).split("\n")[0]


def commands() -> list[tuple[Path, str]]:
    """Every line of the shell's blocks, continued lines joined and parts of && taken apart."""
    return [
        (page, part.strip())
        for page, _, text in blocks("sh")
        for line in text.replace("\\\n", " ").splitlines()
        for part in re.split(r" && ", line.partition("  #")[0])
        if part.strip() and not part.startswith("#")
    ]


KNOWN = {re.sub(r"\.(NAME|N)\b", "", row[0]).rpartition(".")[2] for row in describe_fields(Recipe)}


def check_parsed(parser: Parser, words: list[str], takes_fields: bool) -> None:
    parsed, fields = parser.parse(words, takes_fields)
    assert isinstance(parsed, argparse.Namespace)
    for field in fields:
        assert field.partition("=")[0].rpartition(".")[2] in KNOWN, field


def check_module(module, words: list[str]) -> None:
    """Parse what stands behind a module that has ``add_arguments``, else look its flags up."""
    if hasattr(module, "add_arguments"):
        parser = Parser(prog=module.__name__)
        module.add_arguments(parser)
        check_parsed(parser, words, getattr(module, "TAKES_FIELDS", False))
        return
    for flag in (word for word in words if word.startswith("--")):
        known = (
            KNOWN if "." in flag else re.findall(r"--([\w-]+)", Path(module.__file__).read_text())
        )
        assert flag.lstrip("-").rpartition(".")[2] in known, flag


def check_command(words: list[str]) -> None:
    """Check a command: of the project, one that starts it, or a few of the shell's."""
    while "=" in words[0]:  # an environment variable
        words = words[1:]
    program, *words = words
    if program in ("accelerate", "torchrun"):
        while words and not words[0].endswith(".py") and words[0] != "-m":
            words = words[1:]
        assert words, f"{program} starts nothing"
        program = "python"
    if program == "radio-distill":
        check_module(module_of(words[0]), words[1:])
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "python" and words[:2] == ["-m", "stages.cli"]:
        check_command(["radio-distill", *words[2:]])
    elif program == "python" and words[0] == "-m":
        check_module(import_module(words[1]), words[2:])
    elif program == "python":
        assert (ROOT / words[0]).is_file(), words[0]
        if words[0].startswith("stages/"):
            parser = Parser(prog=words[0])
            add_stage_arguments(parser)
            check_parsed(parser, words[1:], takes_fields=True)
    else:
        assert program in ("git", "cd", "source", "pip"), program


@pytest.mark.parametrize(
    ("page", "line"), [row for row in commands() if row[0].name != "evaluation.md"], ids=name_of
)
def test_commands__exist_with_their_arguments(page, line):
    check_command(shlex.split(line))


def test_evaluation__its_commands_make_the_folders_that_it_describes(tmp_path):
    """Names that a split lists get links; the project's own commands are parsed."""
    lists = tmp_path / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    ran = False
    for page, _, text in blocks("sh"):
        if page.name != "evaluation.md":
            continue
        lines = text.replace("\\\n", " ").splitlines()
        own = [line for line in lines if line.startswith("radio-distill ")]
        for line in own:
            check_command(shlex.split(line, comments=True))
        shell = "\n".join(line for line in lines if line not in own)
        subprocess.run(["bash", "-euc", shell], cwd=tmp_path, check=True)
        ran |= "ln -s" in shell
    assert ran
    links = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("voc/*/*/*")}
    assert {"voc/images/train/a.jpg", "voc/masks/train/b.png", "voc/images/val/c.jpg"} <= links
    assert len(links) == 6


def test_commands__the_readme_shows_all_of_them():
    words = [shlex.split(line) for page, line in commands() if page == ROOT / "README.md"]
    shown = {word[1] for word in words if word[0] == "radio-distill"}
    assert set(COMMANDS) - shown <= {"demo"}  # which make demo calls


def check_fields(value: object, path: tuple[str, ...], patterns: list[tuple[str, ...]]) -> None:
    """Check that every key of a part of a recipe is a field, whatever names stand in it."""
    fits = [
        pattern
        for pattern in patterns
        if all(key in ("NAME", "N", name) for key, name in zip(pattern, path, strict=False))
    ]
    assert fits, ".".join(path)
    if isinstance(value, dict) and any(len(pattern) > len(path) for pattern in fits):
        for key, inner in value.items():
            check_fields(inner, (*path, str(key)), fits)


@pytest.mark.parametrize(("page", "language", "text"), blocks("yaml"), ids=name_of)
def test_yaml__is_of_recipes(page, language, text, tmp_path):
    values = yaml.safe_load(text)
    if page.name == "multi_task_gain.md":
        return  # definitions of metrics, which test_score reads
    check_fields(values, (), [tuple(row[0].split(".")) for row in describe_fields(Recipe)])
    if "stages" in values:
        (tmp_path / "whole.yaml").write_text(text)
        check(load(tmp_path / "whole.yaml"))


PYTHON = [block for block in blocks("python") if block[0].name != "extending.md"]


@pytest.mark.parametrize(("page", "language", "text"), PYTHON, ids=name_of)
def test_python__runs(page, language, text, write_run, tmp_path, monkeypatch, capsys):
    """In a folder with a run and a photograph; those of extending.md have a test of their own."""
    (tmp_path / "runs").mkdir()
    write_run("demo", stage="stage3-bilinear").rename(tmp_path / "runs" / "demo")
    Image.effect_noise((96, 80), 60).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(page), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


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


def test_architecture__names_rooms_and_files_that_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    places = [ROOT / place for place in ("", "radio_distill", "stages", "upsamplers")]
    rooms, files = re.findall(r"`([a-z_]+)/`", page), re.findall(r"`([\w/]+\.py)`", page)
    assert len(rooms) > 5
    for name in [*rooms, *files]:
        assert any((place / name).exists() for place in places), name


def test_architecture__walks_through_files_as_they_are():
    """Each step names a file, about as long as the page says, and things that are in it."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    walk = page.partition("## One image on its way")[2].partition("Beside the path")[0]
    steps = re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]
    assert 12 <= len(steps) <= 18
    for step in steps:
        file, lines = re.match(r"\*\*`([\w/.]+)`\*\* \((\d+) lines\)", step).groups()
        text = (ROOT / file).read_text()
        assert text.count("\n") == pytest.approx(int(lines), rel=0.3), file
        for name in re.findall(r"`(\w+)`", step):
            assert re.search(rf"\b{name}\b", text), f"{file} has no {name}"
