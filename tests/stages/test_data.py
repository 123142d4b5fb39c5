"""``radio-distill data``: which sets there are, and whether a folder holds one whole."""

import dataclasses

import pytest

import layouts
from radio_distill.evals.datasets import DATASETS
from radio_distill.evals.datasets.ade20k import Ade20k
from stages.cli import main


def test_list__names_every_set_with_its_items(capsys):
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in DATASETS.names():
        (line,) = (line for line in lines if line.split()[0] == name)
        assert all(f"{whole:,}" in line for whole in DATASETS.get(name).published.values())


def test_check__says_what_is_missing_of_each_part(tmp_path, capsys):
    layouts.ade20k(tmp_path, train=3, val=2)
    next((tmp_path / "annotations" / "training").iterdir()).unlink()
    assert main(["data", "check", "ade20k", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert ["val", "2", "2,000", "1,998"] in [line.split() for line in out.splitlines()]
    assert "ADE_train_" in out


def test_check__a_whole_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Ade20k, "published", {"train": 3, "val": 2})
    assert main(["data", "check", "ade20k", str(layouts.ade20k(tmp_path))]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1] == ["train", "3", "3"]


@pytest.mark.parametrize(
    "words", [["check"], ["check", "ade20k"], ["check", "ade", "."], ["check", "voc", "/nowhere"]]
)
def test_check__a_call_that_cannot_be_right_is_one_line(words, capsys):
    assert main(["data", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_dataset__is_a_frozen_dataclass_made_of_a_path():
    for name in DATASETS.names():
        kind = DATASETS.get(name)
        assert [field.name for field in dataclasses.fields(kind)] == ["root"]
        assert kind.name == name
        assert kind.licence
        assert kind.layout
        assert all(whole > 0 for whole in kind.published.values())
