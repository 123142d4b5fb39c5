import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.evals.mtl_gain import (
    DEFINITION,
    Measured,
    Metric,
    multi_task_gain,
    relative_gain,
    score_tables,
)

UNEVEN = {
    "knn/top1": Metric(group="Classification", higher_is_better=True, unit="%"),
    "depth/rmse": Metric(group="Dense", higher_is_better=False),
    "seg/miou": Metric(group="Dense", higher_is_better=True, unit="%"),
    "seg/accuracy": Metric(group="Dense", higher_is_better=True, unit="%"),
}
BASE = {"knn/top1": 50.0, "depth/rmse": 0.4, "seg/miou": 40.0, "seg/accuracy": 80.0}
BETTER = {"knn/top1": 55.0, "depth/rmse": 0.5, "seg/miou": 42.0, "seg/accuracy": 80.0}

values = st.floats(0.01, 1e4)


def test_relative_gain__hand_computed() -> None:
    assert relative_gain(55, 50, True) == 10
    assert relative_gain(45, 50, True) == -10
    assert relative_gain(0.5, 0.4, False) == pytest.approx(-25)
    assert relative_gain(0, 4, False) == 100


@given(values, values)
def test_relative_gain__direction_flips_the_sign_only(value: float, baseline: float) -> None:
    assert relative_gain(value, baseline, True) == -relative_gain(value, baseline, False)


@pytest.mark.parametrize("baseline", [0.0, -0.0, -3.0])
def test_relative_gain__baseline_must_be_above_zero(baseline: float) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        relative_gain(1.0, baseline, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_relative_gain__rejects_what_is_not_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        relative_gain(value, 1.0, True)
    with pytest.raises(ConfigError, match="finite"):
        relative_gain(1.0, value, True)


def test_multi_task_gain__hand_computed_and_macro() -> None:
    table = multi_task_gain({"base": BASE, "better": BETTER}, "base", UNEVEN)
    # Classification +10; Dense: rmse 0.4 -> 0.5 is -25, miou +5, accuracy 0.
    dense = (-25 + 5 + 0) / 3
    assert table.groups["better"]["Classification"].mean == pytest.approx(10)
    assert table.groups["better"]["Dense"].mean == pytest.approx(dense)
    assert table.totals["better"].mean == pytest.approx((10 + dense) / 2)
    micro = (10 - 25 + 5 + 0) / 4
    assert micro < 0 < table.totals["better"].mean  # the two means disagree even in sign
    assert table.num_metrics == {"Classification": 1, "Dense": 3}


def test_multi_task_gain__baseline_gains_nothing() -> None:
    table = multi_task_gain({"base": BASE, "better": BETTER}, "base", UNEVEN)
    assert table.totals["base"] == (0, None)
    assert set(table.groups["base"].values()) == {(0, None)}


runs = st.fixed_dictionaries(dict.fromkeys(UNEVEN, values))


@given(
    st.fixed_dictionaries({"a": runs, "b": runs, "c": runs}),
    st.permutations(list(UNEVEN)),
    st.permutations(["a", "b", "c"]),
)
def test_multi_task_gain__order_does_not_matter(results, metrics, models) -> None:  # type: ignore[no-untyped-def]
    shuffled = {model: {name: results[model][name] for name in metrics} for model in models}
    definitions = {name: UNEVEN[name] for name in metrics}
    straight = multi_task_gain(results, "a", UNEVEN)
    other = multi_task_gain(shuffled, "a", definitions)
    assert straight.totals == other.totals
    assert straight.groups == other.groups


@given(st.fixed_dictionaries({"a": runs, "b": runs}), st.sampled_from(list(UNEVEN)), values)
def test_multi_task_gain__unit_does_not_matter(results, name, scale) -> None:  # type: ignore[no-untyped-def]
    scaled = {model: {**run, name: run[name] * scale} for model, run in results.items()}
    before = multi_task_gain(results, "a", UNEVEN).totals["b"].mean
    assert multi_task_gain(scaled, "a", UNEVEN).totals["b"].mean == pytest.approx(before, abs=1e-6)


def test_multi_task_gain__several_results() -> None:
    definitions = {"top1": Metric(group="Classification", higher_is_better=True)}
    results = {
        "base": [{"top1": 49.0}, {"top1": 51.0}],
        "new": [{"top1": 54.0}, {"top1": 55.0}, {"top1": 56.0}],
    }
    table = multi_task_gain(results, "base", definitions)
    new = table.totals["new"]
    assert new.mean == pytest.approx(10)
    assert new.deviation == pytest.approx(statistics.stdev([8, 10, 12]))
    assert table.totals["base"].mean == pytest.approx(0)
    assert table.totals["base"].deviation == pytest.approx(statistics.stdev([-2, 2]))
    text = table.to_table().to_markdown()
    assert "+10.00 ± 2.00" in text
    assert "base 2, new 3" in text


def test_multi_task_gain__missing_metric() -> None:
    partial = {name: value for name, value in BETTER.items() if name != "depth/rmse"}
    results = {"base": BASE, "better": partial}
    with pytest.raises(ConfigError, match=r"'better' lacks metric 'depth/rmse'.*--exclude-missing"):
        multi_task_gain(results, "base", UNEVEN)
    table = multi_task_gain(results, "base", UNEVEN, exclude_missing=True)
    assert table.groups["better"]["Dense"].mean == pytest.approx(2.5)
    assert table.excluded == ("depth/rmse",)
    assert any("depth/rmse" in note for note in table.notes())


def test_multi_task_gain__a_later_result_lacks_a_metric() -> None:
    results = {"base": BASE, "better": [BETTER, {"knn/top1": 51.0}]}
    with pytest.raises(ConfigError, match=r"'better' lacks metric 'depth/rmse' \(and 2 more\)"):
        multi_task_gain(results, "base", UNEVEN)


def test_multi_task_gain__nothing_in_common() -> None:
    results = {"base": {"knn/top1": 1.0}, "other": {"seg/miou": 1.0}}
    with pytest.raises(ConfigError, match="no metric is left"):
        multi_task_gain(results, "base", UNEVEN, exclude_missing=True)


def test_multi_task_gain__unknown_baseline_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'bass'.*did you mean 'base'"):
        multi_task_gain({"base": BASE}, "bass", UNEVEN)


def test_multi_task_gain__unknown_metric_names_the_nearest() -> None:
    results = {"base": {**BASE, "seg/miuo": 1.0}}
    with pytest.raises(UnknownNameError, match=r"'seg/miuo'.*did you mean 'seg/miou'"):
        multi_task_gain(results, "base", UNEVEN)


def test_multi_task_gain__zero_baseline_names_the_metric() -> None:
    with pytest.raises(ConfigError, match=r"metric 'depth/rmse'.*above zero"):
        multi_task_gain({"base": {**BASE, "depth/rmse": 0.0}}, "base", UNEVEN)


def test_multi_task_gain__model_without_results() -> None:
    with pytest.raises(ConfigError, match="'empty' has no results"):
        multi_task_gain({"base": BASE, "empty": []}, "base", UNEVEN)


def test_to_table__definition_is_printed_below() -> None:
    table = multi_task_gain({"base": BASE, "better": BETTER}, "base", UNEVEN).to_table()
    for text in (table.to_markdown(), table.to_html(), table.to_json()):
        assert DEFINITION.split(";")[0].split(" is ")[1][:12] in text
    assert [column.name for column in table.columns] == ["Model", "Δm", "Classification", "Dense"]


def test_to_table__group_called_like_the_total() -> None:
    definitions = {"top1": Metric(group="Δm", higher_is_better=True)}
    table = multi_task_gain({"base": {"top1": 1.0}}, "base", definitions)
    with pytest.raises(ConfigError, match="two columns are called 'Δm'"):
        table.to_table()


def test_score_tables__a_table_a_group_with_gaps_shown() -> None:
    first, second = score_tables({"base": BASE, "part": {"seg/miou": 41.5}}, UNEVEN)
    assert [row[0] for row in first.rows] == ["base"], "a model without any score has no row"
    assert second.rows[1][0] == "part"
    assert second.rows[1].count(None) == 2
    assert [column.heading for column in second.columns] == [
        "Model", "depth/rmse ↓", "seg/miou (%) ↑", "seg/accuracy (%) ↑",
    ]  # fmt: skip
    assert "41.50" in second.to_markdown()


def test_multi_task_gain__only_headlines_count():
    definitions = {
        "a": Metric(group="g", higher_is_better=True),
        "b": Metric(group="g", higher_is_better=True, headline=False),
    }
    results = {"base": {"a": 10.0, "b": -1.0}, "new": {"a": 11.0}}
    gain = multi_task_gain(results, "base", definitions)
    assert gain.totals["new"].mean == pytest.approx(10)
    assert gain.num_metrics == {"g": 1}
    only = {"b": definitions["b"]}
    with pytest.raises(ConfigError, match="no metric is left"):
        multi_task_gain({"base": {"b": 1.0}}, "base", only)


TRAINED = {
    **UNEVEN,
    "fidelity/fidelity/dino": Metric(group="Fidelity", higher_is_better=True, trained_for=True),
    "fidelity/fidelity/clip": Metric(group="Fidelity", higher_is_better=True, trained_for=True),
    "fidelity/mse/dino": Metric(
        group="Fidelity", higher_is_better=False, trained_for=True, headline=False
    ),
}
FIDELITY = {"fidelity/fidelity/dino": 1.2, "fidelity/fidelity/clip": 0.5, "fidelity/mse/dino": 9.0}


def test_multi_task_gain__what_students_are_trained_for_stands_beside_it():
    plain = multi_task_gain({"base": BASE, "better": BETTER}, "base", UNEVEN)
    results = {"base": {**BASE, **FIDELITY}, "better": {**BETTER, "fidelity/fidelity/dino": 9.0}}
    table = multi_task_gain(results, "base", TRAINED)
    assert table.totals == plain.totals
    assert table.groups == plain.groups
    (beside,) = table.beside
    assert [column.name for column in beside.columns] == ["Model", "dino", "clip"]
    assert [row[1].mean for row in beside.rows] == [1.2, 9.0]
    assert table.to_tables() == [table.to_table(), beside]
    assert any("Fidelity does not count" in note for note in table.notes())


def test_multi_task_gain__no_delta_of_what_students_are_trained_for_alone():
    metrics = {name: metric for name, metric in TRAINED.items() if metric.trained_for}
    table = multi_task_gain({"base": FIDELITY, "better": FIDELITY}, "base", metrics)
    assert table.totals == {}
    assert table.to_table().rows == (("base", None), ("better", None))
    assert any("no student was trained for" in note for note in table.notes())
    assert len(table.beside) == 1


def test_multi_task_gain__a_teacher_may_lack_metrics():
    teacher = {"knn/top1": 60.0, "seg/miou": 44.0, "only/it": 3.0}
    metrics = UNEVEN | {"only/it": Metric(group="Dense", higher_is_better=True)}
    results = {"base": BASE, "teacher dino": teacher}
    table = multi_task_gain(results, "base", metrics, may_lack={"teacher dino"})
    assert table.groups["teacher dino"]["Classification"].mean == pytest.approx(20)
    assert "Dense" not in table.groups["teacher dino"]
    assert "teacher dino" not in table.totals
    assert table.num_metrics == {"Classification": 1, "Dense": 3}
    assert table.to_table().rows[1] == ("teacher dino", None, (pytest.approx(20), None), None)
    with pytest.raises(ConfigError, match="'teacher dino' lacks metric"):
        multi_task_gain({"base": BASE, "teacher dino": {"knn/top1": 60.0}}, "base", UNEVEN)


def test_score_tables__a_table_for_each_measure_of_several_teachers():
    names = [f"fidelity/{kind}/t{n}" for kind in ("fidelity", "mse", "cosine") for n in range(4)]
    metrics = dict.fromkeys(names, Metric(group="Fidelity", higher_is_better=True))
    tables = score_tables({"a": dict.fromkeys(names, 1.0)}, metrics)
    assert [table.title for table in tables] == ["Fidelity", "Fidelity: mse", "Fidelity: cosine"]
    for table in tables:
        assert [column.name for column in table.columns] == ["Model", "t0", "t1", "t2", "t3"]
        assert table.split(60) == [table]


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
