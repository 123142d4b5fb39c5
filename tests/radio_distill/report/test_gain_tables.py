"""Tables of gains and scores: what stands in them, under them and beside them."""

import subprocess
import sys

import pytest

from radio_distill.errors import ConfigError
from radio_distill.evals.gain import Measured, Metric, multi_task_gain
from radio_distill.report.gain_tables import DEFINITION, gain_table, headline_table, score_tables

UNEVEN = {
    "knn/top1": Metric(group="Classification", higher_is_better=True, unit="%"),
    "depth/rmse": Metric(group="Dense", higher_is_better=False),
    "seg/miou": Metric(group="Dense", higher_is_better=True, unit="%"),
    "seg/accuracy": Metric(group="Dense", higher_is_better=True, unit="%"),
}
BASE = {"knn/top1": 50.0, "depth/rmse": 0.4, "seg/miou": 40.0, "seg/accuracy": 80.0}
BETTER = {"knn/top1": 55.0, "depth/rmse": 0.5, "seg/miou": 42.0, "seg/accuracy": 80.0}


def test_to_table__definition_is_printed_below() -> None:
    table = gain_table(multi_task_gain({"base": BASE, "better": BETTER}, "base", UNEVEN))
    for text in (table.to_markdown(), table.to_html(), table.to_json()):
        assert DEFINITION.split(";")[0].split(" is ")[1][:12] in text
    assert [column.name for column in table.columns] == ["Model", "Δm", "Classification", "Dense"]


def test_to_table__group_called_like_the_total() -> None:
    definitions = {"top1": Metric(group="Δm", higher_is_better=True)}
    table = multi_task_gain({"base": {"top1": 1.0}}, "base", definitions)
    with pytest.raises(ConfigError, match="'Δm'"):
        gain_table(table)


def test_score_tables__a_table_a_group_with_gaps_shown() -> None:
    first, second = score_tables({"base": BASE, "part": {"seg/miou": 41.5}}, UNEVEN)
    assert [row[0] for row in first.rows] == ["base"], "a model without any score has no row"
    assert second.rows[1][0] == "part"
    assert second.rows[1].count(None) == 2
    assert [column.heading for column in second.columns] == [
        "Model", "depth/rmse ↓", "seg/miou (%) ↑", "seg/accuracy (%) ↑",
    ]  # fmt: skip
    assert "41.50" in second.to_markdown()


def test_score_tables__a_table_for_each_measure_of_several_teachers():
    names = [f"fidelity/{kind}/t{n}" for kind in ("fidelity", "mse", "cosine") for n in range(4)]
    metrics = dict.fromkeys(names, Metric(group="Fidelity", higher_is_better=True))
    tables = score_tables({"a": dict.fromkeys(names, 1.0)}, metrics)
    assert [table.title for table in tables] == ["Fidelity", "Fidelity: mse", "Fidelity: cosine"]
    for table in tables:
        assert [column.name for column in table.columns] == ["Model", "t0", "t1", "t2", "t3"]
        assert len(table.grid().fitted(60)) == 1


def test_score_tables__say_the_sizes_of_the_input_and_what_it_was_of():
    how = Measured(9, "64x64")
    measured = {"base": dict.fromkeys(BASE, how), "sam": {"seg/miou": Measured(9, "1024x1024")}}
    measured["base"]["knn/top1"] = Measured(9, "64x64", details="classes 3")
    results = {"base": BASE, "sam": {"seg/miou": 41.5}, "old": {"seg/miou": 40.0}}
    first, second = score_tables(results, UNEVEN, measured)
    assert first.title == "Classification: knn"
    assert first.notes == ("knn: images 9, classes 3", "Input in pixels: 64x64.")
    assert second.notes == ("Input in pixels: 64x64 (base); 1024x1024 (sam).",)
    assert score_tables(results, UNEVEN)[0].notes == ()


def test_score_tables__a_group_of_many_metrics_has_a_table_for_each_benchmark():
    names = [f"{kind}/recall@{n}px" for kind in ("correspondence", "stereo") for n in range(4)]
    metrics = dict.fromkeys(names, Metric(group="Correspondence", higher_is_better=True))
    first, second = score_tables({"a": dict.fromkeys(names, 1.0)}, metrics)
    assert (first.title, second.title) == ("Correspondence", "Correspondence: stereo")
    assert [column.name for column in second.columns[1:]] == [f"recall@{n}px" for n in range(4)]


def test_import__needs_no_torch() -> None:
    modules = ["evals.gain", "evals.scores", "report.gain_tables", "report.page"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module('radio_distill.' + name)\n"
        "print({'torch', 'numpy', 'pandas', 'matplotlib', 'PIL', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("set()", "")


def test_headline_table__what_counts_of_all_groups_in_the_papers_order() -> None:
    definitions = {
        "own/top1": Metric(group="Own", higher_is_better=True, unit="%"),
        "own/top5": Metric(group="Own", higher_is_better=True, unit="%", headline=False),
        "fidelity/x": Metric(group="Fidelity", higher_is_better=True, trained_for=True),
        "nyud/depth_rmse": Metric(group="NYUDv2", higher_is_better=False, unit="m"),
        "voc/miou": Metric(group="Dense", higher_is_better=True, unit="%"),
    }
    run = {"own/top1": 1.0, "own/top5": 2.0, "fidelity/x": 3.0, "voc/miou": 85.5}
    results = {"a": [run, {**run, "voc/miou": 86.5}], "b": {"fidelity/x": 4.0}}
    measured = {
        "a": {"voc/miou": Measured(9, protocol="voc@1"), "own/top5": Measured(protocol="no")}
    }
    table = headline_table(results, definitions, measured)
    assert [column.heading for column in table.columns] == [
        "Model", "voc/miou (%) ↑", "nyud/depth_rmse (m) ↓", "own/top1 (%) ↑"
    ]  # fmt: skip
    ((model, miou, rmse, _),) = table.rows  # b has nothing that counts
    assert (model, miou.mean, rmse) == ("a", 86.0, None)
    assert table.notes == ("Protocol: voc@1.",)


def test_score_tables__rows_of_different_protocols_are_told_apart() -> None:
    definitions = {"voc/miou": Metric(group="Dense", higher_is_better=True, unit="%")}
    results = {name: {"voc/miou": 1.0} for name in "abc"}
    measured = {
        name: {"voc/miou": Measured(9, protocol=protocol)}
        for name, protocol in (("a", "voc@1"), ("b", "voc@2"), ("c", "voc@2"))
    }
    (table,) = score_tables(results, definitions, measured)
    assert "voc@1 (a), voc@2 (b, c)" in table.notes[0]
    (alike,) = score_tables({name: results[name] for name in "bc"}, definitions, measured)
    assert alike.notes == ("Protocol: voc@2.",)
