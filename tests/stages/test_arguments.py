"""One grammar of the command line: the recipe is positional, and a flag means one thing."""

import subprocess
import sys
from pathlib import Path

import pytest

from radio_distill.config import Recipe, describe_fields, override
from radio_distill.errors import ConfigError
from stages import fit_upsampler, stage1, stage3
from stages.arguments import Parser, add_recipe_argument, add_run_folder_argument
from stages.cli import COMMANDS, module_of

WITH_RECIPE = ("train", "plan", "sweep", "fit-upsampler", "upsampler-report")


def parser_of(command: str) -> Parser:
    parser = Parser(prog=command)
    module_of(command).add_arguments(parser)
    return parser


@pytest.mark.parametrize("command", WITH_RECIPE)
@pytest.mark.parametrize("words", [["mine"], ["--recipe", "mine"], ["--seed=3", "mine"]])
def test_recipe__is_positional_and_a_flag_says_the_same(command, words):
    assert parser_of(command).parse(words, takes_fields=True)[0].recipe == "mine"


def test_recipe__comes_behind_other_positional_arguments():
    words = ["featsharp", "last.pth.tar", "--teacher", "siglip", "mine"]
    assert parser_of("convert-upsampler").parse(words, takes_fields=True)[0].recipe == "mine"


def test_recipe__may_be_named_once_only():
    with pytest.raises(ConfigError, match=r"'mine'.*--recipe 'yours'"):
        parser_of("train").parse(["mine", "--recipe", "yours"], takes_fields=True)


@pytest.mark.parametrize("module", [stage1, stage3, fit_upsampler])
def test_recipe__an_unknown_one_names_the_nearest(module, capsys):
    assert module.main(["dmeo", "--resume"]) == 2
    assert "'dmeo' (did you mean 'demo'?)" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help__of_every_command_needs_no_torch_and_is_short(command):
    code = f"""
import sys
from stages.cli import main
try:
    main([{command!r}, "--help"])
except SystemExit:
    pass
print(sorted({{"torch", "timm", "transformers", "open_clip", "deepspeed"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *text, heavy = done.stdout.splitlines()
    assert heavy == "[]", done.stderr
    assert 3 < len(text) < 150


def test_help__takes_about_a_fifth_of_a_second_of_cpu():
    code = "from stages.cli import main\nimport time\nmain([])\nprint(time.process_time())"
    command = [sys.executable, "-c", code]
    seconds = [
        float(subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(3)
    ]
    assert min(seconds) < 0.25, seconds


def test_parser__unknown_flags_name_the_nearest():
    parser = Parser(prog="x")
    parser.add_argument("--resume", action="store_true")
    with pytest.raises(ConfigError, match=r"'--resmue'.*'--resume'"):
        parser.parse(["--resmue"], takes_fields=True)
    with pytest.raises(ConfigError, match=r"--stages\.NAME\.steps"):
        parser.parse(["--steps", "3"], takes_fields=True)
    with pytest.raises(ConfigError, match="--seed"):
        parser.parse(["--seed"], takes_fields=True)
    assert parser.parse(["--seed", "3", "--resume", "--a.b=c"], takes_fields=True)[1] == [
        "seed=3",
        "a.b=c",
    ]


def test_parser__a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    parser = Parser(prog="x")
    parser.add_argument("--output", type=Path)
    assert parser.parse(["--output=~/runs"], takes_fields=False)[0].output == Path(
        "/home/of me/runs"
    )


@pytest.mark.parametrize("folder", ["runs #1/a=b", "null", "a: b", "[x], y"])
def test_parser__a_folder_of_runs_is_what_was_typed(folder):
    parser = Parser(prog="x")
    add_run_folder_argument(parser)
    fields = parser.parse(["--output", folder], takes_fields=True)[1]
    assert override({}, fields) == {"output": folder}


@pytest.mark.parametrize("command", ["mode-switching", "report", "upsampler-report"])
def test_num_images__is_no_negative_number(command):
    with pytest.raises(ConfigError, match="'-5' is no number of images"):
        parser_of(command).parse(["x", "--num-images=-5"], takes_fields=False)


def test_fields__their_names_are_no_flags_of_a_command():
    names = {row[0] for row in describe_fields(Recipe)}
    for command in COMMANDS:
        flags = {flag for action in parser_of(command)._actions for flag in action.option_strings}
        assert not flags & {f"--{name}" for name in names if "." in name}, command


@pytest.mark.parametrize(
    ("argv", "recipe", "is_said"),
    [([], "demo", True), (["demo"], "demo", False), (["--recipe", "mine"], "mine", False)],
)
def test_parse__says_which_recipe_is_taken_where_none_is_named(capsys, argv, recipe, is_said):
    parser = Parser()
    add_recipe_argument(parser)
    arguments, _ = parser.parse(argv, takes_fields=True)
    assert arguments.recipe == recipe
    assert ("demo" in capsys.readouterr().err) == is_said
