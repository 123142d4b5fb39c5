"""What a suite asks follows from the data that is named."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from radio_distill.config import EvaluationConfig
from radio_distill.errors import ConfigError
from radio_distill.evals import suites
from radio_distill.evals.headlines import HEADLINES
from radio_distill.evals.run import BENCHMARKS
from radio_distill.evals.suites import OWN, PUBLISHED, with_suite


@dataclass(frozen=True)
class Probe:
    """A probe of a data set."""

    data: str
    size: int = 512
    steps: int = 40_000
    quick: bool = False

    name: ClassVar[str] = "probe"
    sources: ClassVar[dict[str, str]] = {"data": "data.ade20k"}


@pytest.fixture
def with_probe(monkeypatch):
    monkeypatch.setitem(BENCHMARKS._targets, "ade20k", f"{__name__}:Probe")


def test_suites__published_are_the_table_and_what_stands_beside_it():
    benchmarks = [name.partition("/")[0] for name, m in HEADLINES.items() if m.group != "VILA"]
    assert list(dict.fromkeys(benchmarks)) == list(PUBLISHED[:-2])
    assert len(PUBLISHED) == 15
    assert set(OWN) == {name for name in BENCHMARKS.names() if name in OWN}


@pytest.mark.usefixtures("with_probe")
def test_with_suite__asks_what_data_is_named_for():
    config = EvaluationConfig(data={"ade20k": "/ade"}, images="/images", size=192)
    published, left_out = with_suite(config, "published")
    assert published.benchmarks == ("ade20k",)
    assert published.options == {}
    assert published.limit == 0
    assert left_out.keys() == set(PUBLISHED) - {"ade20k"}
    quick, left_out = with_suite(config, "quick")
    assert {"ade20k", "correspondence", "agreement", "fidelity"} <= set(quick.benchmarks)
    assert {"knn", "segmentation", "voc"} <= left_out.keys()
    assert quick.options["ade20k"] == {"size": 224, "steps": 200, "quick": True}
    assert "size" not in quick.options["agreement"]  # the recipe's own
    assert quick.limit == suites.QUICK_LIMIT


@pytest.mark.usefixtures("with_probe")
def test_with_suite__what_the_recipe_says_holds():
    options = {"ade20k": {"steps": 7}, "knn": {"k": 2}}
    config = EvaluationConfig(data={"ade20k": "/ade"}, limit=5, options=options)
    quick, _ = with_suite(config, "quick")
    assert quick.options == {
        **options,
        "ade20k": {"size": 224, "steps": 7, "quick": True},
        **{name: quick.options[name] for name in quick.benchmarks if name not in options},
    }
    assert quick.limit == 5


def test_with_suite__no_data_is_one_line():
    with pytest.raises(ConfigError, match=r"evaluation\.data"):
        with_suite(EvaluationConfig(), "published")
