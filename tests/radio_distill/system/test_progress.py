import pytest

from radio_distill.system import progress
from radio_distill.system.progress import Progress, duration


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("unit", "images", "done", "seconds", "expected"),
    [
        ("steps", 32, 20, 4, "5.0 steps/s, 160.0 img/s"),
        ("steps", 32, 20, 50, "2.5 s/step, 12.8 img/s"),
        ("batches", 0, 1, 90, "90.0 s/batch"),
        ("img", 0, 50, 20, "2.5 img/s"),
        ("img", 0, 1, 8, "8.0 s/img"),
        ("steps", 0, 0, 9, "0.0 steps/s"),
    ],
)
def test_speed(clock, unit, images, done, seconds, expected):
    bar = Progress("x", 100, unit, visible=False, images=images)
    clock.now += seconds
    bar.update(done)
    assert bar.speed == expected


def test_progress__plain_lines_count_what_the_recipe_counts(clock, capsys):
    with Progress("stage1", 40, "steps", start=10, images=8) as bar:
        clock.now += 20
        bar.update(20, "loss 0.5")
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "stage1  20/40 steps  2.0 s/step, 4.0 img/s  loss 0.5  ETA 0:40"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.24e-6, "0.0042 ms"), (0.0086, "8.6 ms"), (0.3, "0.3 s"), (9.94, "9.9 s"), (31.9, "32 s"),
        (59.9, "60 s"), (60, "1.0 min"), (754, "13 min"), (3600, "1.0 h"), (4500, "1.2 h"),
        (3600 * 99.5, "99.5 h"), (3600 * 14080, "14,080 h"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text
