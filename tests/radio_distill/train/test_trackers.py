"""Where the numbers of a run go, and that no tracker ends a run."""

import io
import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from radio_distill.config import Recipe, build
from radio_distill.errors import ConfigError
from radio_distill.train import trackers
from radio_distill.train.trackers import JsonLines, check_trackers, open_trackers, read_json_lines


def stage_of(folder, *names, options=None):
    """What trackers read of a stage."""
    data = {
        "name": "demo",
        "data": {"shards": ["x"]},
        "teachers": {"t": {"preset": "p", "options": options or {}}},
        "log": {"trackers": list(names)},
        "stages": {},
    }
    recipe = build(Recipe, data)
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(folder=folder, recipe=recipe, log=recipe.log)


def test_json_lines__a_resumed_run_drops_what_it_will_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 10})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    resumed = JsonLines(path, resume_step=20)
    resumed.write(30, {"loss": 99.0})
    resumed.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.0), (20, 2.0), (30, 99.0)]


def test_tensorboard__holds_the_same_numbers_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    with open_trackers(stage_of(tmp_path, "tensorboard"), is_main=True) as opened:
        opened.write(1, {"loss": 0.25})
        opened.write(2, {"loss": 0.125})
        opened.write_image(3, "features", image)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 0.25), (2, 0.125)]
    (event,) = events.Images("features")
    assert event.step == 3
    assert np.array_equal(Image.open(io.BytesIO(event.encoded_image_string)), image)
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [0.25, 0.125], "numbers alone"


def test_open_trackers__only_the_main_process_writes(tmp_path):
    with open_trackers(stage_of(tmp_path, "tensorboard"), is_main=False) as opened:
        opened.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["open", "write", "write_image", "close"])
def test_trackers__one_that_fails_is_warned_of_once_and_left_out(
    tmp_path, monkeypatch, caplog, moment
):
    class Failing:
        def __init__(self, stage, resume_step):
            self.fail("open")

        def fail(self, name):
            if name == moment:
                raise RuntimeError("the server is away")

        def write(self, step, values):
            self.fail("write")

        def write_image(self, step, name, image):
            self.fail("write_image")

        def close(self):
            self.fail("close")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    with open_trackers(stage_of(tmp_path, "wandb"), is_main=True) as opened:
        for step in (1, 2):
            opened.write(step, {"loss": 1.0})
            opened.write_image(step, "features", np.zeros((2, 2, 3), np.uint8))
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 2
    (record,) = caplog.records
    assert "wandb failed and is left out: the server is away" in record.getMessage()


def test_trackers__a_log_that_cannot_be_written_is_the_caller_s(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="logs"):
        open_trackers(stage_of(tmp_path), is_main=True)


def test_check_trackers__says_what_to_install(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install radio-distill\[mlflow\]"):
        check_trackers(["mlflow"])


def test_trackers__settings_are_whole_whatever_is_hidden_in_them(tmp_path, monkeypatch):
    """A value that begins with what is hidden, and names and words that are no secrets."""
    begun = {}
    library = SimpleNamespace(
        init=lambda **fields: begun.update(fields) or SimpleNamespace(id="1"), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setenv("HUB_TOKEN", "as-long-as-a-token")
    options = {"path": "as-long-as-a-token/x", "mysecret": "a: b # c", "sizes": [1, 2]}
    with open_trackers(stage_of(tmp_path, "wandb", options=options), is_main=True):
        pass
    assert begun["config"]["teachers"]["t"]["options"] == options | {"path": "***/x"}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Every tracker writes below the test's folder, and none asks a server."""
    monkeypatch.chdir(tmp_path)  # MLflow keeps files beside its database or here
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_tracker__takes_numbers_and_goes_on_in_the_run_that_is_resumed(offline, caplog, name):
    pytest.importorskip(name)
    ids = []
    for start in (0, 2):
        stage = stage_of(offline / "stage1", name, options={"url": "https://u:pass@host/x"})
        with open_trackers(stage, is_main=True, resume_step=start) as opened:
            for step in (start + 1, start + 2):
                opened.write(step, {"loss/total": 1.0 / step})
            opened.write_image(start + 2, "features", np.zeros((4, 4, 3), np.uint8))
        ids.append(json.loads((offline / "stage1" / "trackers.json").read_text()))
    assert ids[0] == ids[1], "the same run"
    assert "left out" not in caplog.text
    texts = [path.read_bytes() for path in offline.rglob("*") if path.is_file()]
    assert not any(b"u:pass@" in text for text in texts), "secrets are taken out"


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow__holds_the_steps(offline):
    from mlflow import MlflowClient

    with open_trackers(stage_of(offline / "stage1", "mlflow"), is_main=True) as opened:
        opened.write(1, {"loss/total": 0.5})
        opened.write(2, {"loss/total": 0.25})
    run = json.loads((offline / "stage1" / "trackers.json").read_text())["mlflow"]
    history = MlflowClient().get_metric_history(run, "loss/total")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 0.25)]
