"""What a suite asks follows from the data that is named."""

import pytest

from radio_distill.config import EvaluationConfig
from radio_distill.errors import ConfigError
from radio_distill.evals import suites
from radio_distill.evals.headlines import HEADLINES
from radio_distill.evals.run import BENCHMARKS
from radio_distill.evals.suites import PUBLISHED, with_suite


def test_suites__published_are_the_table_and_what_stands_beside_it():
    benchmarks = [name.partition("/")[0] for name, m in HEADLINES.items() if m.group != "VILA"]
    assert list(dict.fromkeys(benchmarks)) == list(PUBLISHED[:-2])
    assert len(PUBLISHED) == 15


def test_with_suite__asks_what_data_is_named_for():
    config = EvaluationConfig(data={"spair": "/spair"}, images="/images", size=192)
    published, left_out = with_suite(config, "published")
    assert published.benchmarks == ("spair",)
    assert published.options == {}
    assert published.limit == 0
    assert left_out.keys() == set(PUBLISHED) - {"spair"}
    quick, left_out = with_suite(config, "quick")
    assert {"spair", "correspondence", "agreement", "fidelity"} <= set(quick.benchmarks)
    assert {"knn", "segmentation", "voc"} <= left_out.keys()
    assert {*quick.benchmarks, *left_out} == {*PUBLISHED, *BENCHMARKS.names()}
    assert quick.options["spair"] == {"size": 224}
    assert quick.options.keys() == {"spair", "agreement"}
    assert "size" not in quick.options["agreement"]  # the recipe's own
    assert (quick.size, quick.dense_size) == (192, 224)
    assert quick.limit == suites.QUICK_LIMIT


def test_with_suite__what_the_recipe_says_holds():
    options = {"spair": {"threshold": 0.2}, "knn": {"k": 2}}
    config = EvaluationConfig(data={"spair": "/spair"}, limit=5, options=options)
    quick, _ = with_suite(config, "quick")
    assert quick.options["spair"] == {"size": 224, "threshold": 0.2}
    assert quick.options["knn"] == {"k": 2}
    assert quick.limit == 5


def test_with_suite__asks_some_of_its_benchmarks_alone():
    config = EvaluationConfig(data={"spair": "/spair"}, images="/images")
    quick, left_out = with_suite(config, "quick", ("agreement", "knn"))
    assert quick.benchmarks == ("agreement",)
    assert left_out.keys() == {"knn"}
    with pytest.raises(ConfigError, match=r"fidelity.*evaluation\.benchmarks"):
        with_suite(config, "published", ("spair", "fidelity"))


def test_with_suite__no_data_is_one_line():
    with pytest.raises(ConfigError, match=r"evaluation\.data"):
        with_suite(EvaluationConfig(), "published")
