"""Gain table (Δm) of scores: how much better each model is than a baseline, over many metrics.

    radio-distill score runs/demo --baseline bilinear
    radio-distill score runs/mine runs/other --baseline mine/stage3-tile --models tile featsharp
    radio-distill score mine.csv --definitions metrics.yaml --baseline old --format latex
    radio-distill score runs/mine tile=llava/tile_results.json --baseline bilinear --exclude-missing

A model is named by its label in the table, or by those parts of it that no other label has: the
stage, the upsampler of a stage 3, the run. Only tasks that no student was trained for count in Δm;
fidelity to the teachers is shown beside it. docs/multi_task_gain.md explains numbers and files.
"""

import argparse
from pathlib import Path

from radio_distill.errors import ConfigError
from radio_distill.evals.gain import multi_task_gain
from radio_distill.evals.headlines import in_order
from radio_distill.evals.score_tables import read_definitions
from radio_distill.evals.scores import read_scores
from radio_distill.report.gain_tables import beside_tables, gain_table, score_tables
from radio_distill.report.tables import FORMATS, Table, print_tables, render
from radio_distill.system.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add(
        "results",
        nargs="*",
        help="scores.jsonl, YAML, JSON or CSV files, folders of scores; [NAME=]FILE of lmms-eval",
    )
    add("--baseline", metavar="NAME", help="model that the others are compared with")
    add("--definitions", metavar="FILE", help="YAML of metrics: group, higher_is_better, unit")
    add("--models", nargs="+", metavar="NAME", help="compare these models only")
    add(
        "--exclude-missing",
        action="store_true",
        help="leave a metric that some model lacks out for all, instead of stopping",
    )
    add("--scores", action="store_true", help="show the scores themselves, too")
    add("--format", choices=["terminal", *FORMATS], default="terminal", help="(default: terminal)")
    add("--output", metavar="FILE", help="write there instead of to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the tables that the arguments ask for."""
    tables = _tables(arguments)
    if arguments.output:
        write_text(Path(arguments.output), render(tables, arguments.format))
    elif arguments.format == "terminal":
        print_tables(tables)
    else:
        print(render(tables, arguments.format), end="")
    return 0


def _tables(arguments: argparse.Namespace) -> list[Table]:
    if not arguments.results:
        raise ConfigError("name at least one file or folder of scores, such as runs/mine")
    if not arguments.baseline:
        known = ", ".join(read_scores(arguments.results).results)
        raise ConfigError(f"name what the others are compared with: --baseline NAME ({known})")
    given = read_definitions(arguments.definitions) if arguments.definitions else {}
    scores = read_scores(arguments.results, settled=given)
    if not scores.definitions | given:
        raise ConfigError("these scores do not say what their metrics are; add --definitions FILE")
    baseline = scores.named(arguments.baseline, "baseline")
    if arguments.models:
        named = [scores.named(model) for model in arguments.models]
        scores = scores.only([*named, *([] if baseline in named else [baseline])])
    definitions = in_order(scores.definitions | given)
    scores.check_alike()
    gains = multi_task_gain(
        scores.results,
        baseline,
        definitions,
        exclude_missing=arguments.exclude_missing,
        may_lack=() if arguments.models else scores.teachers,
        remarks=scores.remarks(),
    )
    raw = score_tables(scores.results, definitions, scores.measured) if arguments.scores else []
    # Programs get one table, unless they ask for the scores, which have what is beside it.
    beside = [] if arguments.format in ("csv", "json") else beside_tables(gains)
    return [gain_table(gains), *beside, *raw]
