"""A benchmark takes its data set by name from ``evaluation.data``."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.errors import ConfigError, DataError
from radio_distill.evals.run import BENCHMARKS, check_data, make


@dataclass(frozen=True)
class Needy:
    """A benchmark over ADE20K."""

    data: str
    size: int

    name: ClassVar[str] = "needy"
    sources: ClassVar[dict[str, str]] = {"data": "data.ade20k", "size": "size"}

    def run(self, encoder, limit=None, progress=None):
        return []


@dataclass(frozen=True)
class Wrong(Needy):
    sources: ClassVar[dict[str, str]] = {"data": "data.ade20kk"}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(BENCHMARKS, "get", {"needy": Needy, "wrong": Wrong}.get)


def test_make__the_path_comes_from_the_data_sets_name(tmp_path):
    path = str(layouts.ade20k(tmp_path))
    config = EvaluationConfig(benchmarks=("needy",), data={"ade20k": path}, size=32)
    assert make("needy", config) == Needy(path, 32)
    check_data(config)


def test_make__a_data_set_that_is_not_named_or_does_not_exist():
    with pytest.raises(ConfigError, match=r"evaluation\.data\.ade20k is empty"):
        make("needy", EvaluationConfig())
    with pytest.raises(ConfigError, match=r"did you mean 'data\.ade20k'"):
        make("wrong", EvaluationConfig())


def test_check_data__a_wrong_folder_and_a_name_that_no_data_set_has(tmp_path):
    config = EvaluationConfig(benchmarks=("needy",), data={"ade20k": str(tmp_path)})
    with pytest.raises(DataError, match="ade20k"):
        check_data(config)
    with pytest.raises(ConfigError, match=r"evaluation\.data.*'ade2k'.*ade20k"):
        make("needy", EvaluationConfig(data={"ade2k": str(tmp_path)}))
