import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_distill.errors import ConfigError
from radio_distill.evals.gain import (
    Metric,
    multi_task_gain,
    relative_gain,
)
from radio_distill.report.gain_tables import beside_tables, gain_notes, gain_table, gain_tables

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
    text = gain_table(table).to_markdown()
    assert "+10.00 ± 2.00" in text
    assert "base 2, new 3" in text


def test_multi_task_gain__missing_metric() -> None:
    partial = {name: value for name, value in BETTER.items() if name != "depth/rmse"}
    results = {"base": BASE, "better": partial}
    with pytest.raises(ConfigError, match=r"'better'.*'depth/rmse'.*--exclude-missing"):
        multi_task_gain(results, "base", UNEVEN)
    table = multi_task_gain(results, "base", UNEVEN, exclude_missing=True)
    assert table.groups["better"]["Dense"].mean == pytest.approx(2.5)
    assert table.excluded == ("depth/rmse",)
    assert any("depth/rmse" in note for note in gain_notes(table))


def test_multi_task_gain__a_later_result_lacks_a_metric() -> None:
    results = {"base": BASE, "better": [BETTER, {"knn/top1": 51.0}]}
    with pytest.raises(ConfigError, match=r"'better'.*'depth/rmse'.* 2 more"):
        multi_task_gain(results, "base", UNEVEN)


def test_multi_task_gain__nothing_in_common() -> None:
    results = {"base": {"knn/top1": 1.0}, "other": {"seg/miou": 1.0}}
    with pytest.raises(ConfigError, match="no metric"):
        multi_task_gain(results, "base", UNEVEN, exclude_missing=True)


@pytest.mark.parametrize(
    ("results", "baseline", "message"),
    [
        ({"base": BASE}, "bass", r"'bass'.*'base'"),
        ({"base": {**BASE, "seg/miuo": 1.0}}, "base", r"'seg/miuo'.*'seg/miou'"),
        ({"base": {**BASE, "depth/rmse": 0.0}}, "base", r"metric 'depth/rmse'.*above zero"),
        ({"base": BASE, "empty": []}, "base", "'empty'"),
    ],
)
def test_multi_task_gain__what_cannot_be_compared_is_named(results, baseline, message):
    with pytest.raises(ConfigError, match=message):
        multi_task_gain(results, baseline, UNEVEN)


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
    with pytest.raises(ConfigError, match="no metric"):
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
    (beside,) = beside_tables(table)
    assert [column.name for column in beside.columns] == ["Model", "dino", "clip"]
    assert [row[1].mean for row in beside.rows] == [1.2, 9.0]
    assert gain_tables(table) == [gain_table(table), beside]
    assert any("Fidelity does not count" in note for note in gain_notes(table))


def test_multi_task_gain__no_delta_of_what_students_are_trained_for_alone():
    metrics = {name: metric for name, metric in TRAINED.items() if metric.trained_for}
    table = multi_task_gain({"base": FIDELITY, "better": FIDELITY}, "base", metrics)
    assert table.totals == {}
    assert gain_table(table).rows == (("base", None), ("better", None))
    assert any("no student was trained for" in note for note in gain_notes(table))
    assert len(beside_tables(table)) == 1


def test_multi_task_gain__a_teacher_may_lack_metrics():
    teacher = {"knn/top1": 60.0, "seg/miou": 44.0, "only/it": 3.0}
    metrics = UNEVEN | {"only/it": Metric(group="Dense", higher_is_better=True)}
    results = {"base": BASE, "teacher dino": teacher}
    table = multi_task_gain(results, "base", metrics, may_lack={"teacher dino"})
    assert table.groups["teacher dino"]["Classification"].mean == pytest.approx(20)
    assert "Dense" not in table.groups["teacher dino"]
    assert "teacher dino" not in table.totals
    assert table.num_metrics == {"Classification": 1, "Dense": 3}
    assert gain_table(table).rows[1] == ("teacher dino", None, (pytest.approx(20), None), None)
    with pytest.raises(ConfigError, match="'teacher dino'"):
        multi_task_gain({"base": BASE, "teacher dino": {"knn/top1": 60.0}}, "base", UNEVEN)
