"""What was decided is remembered in order, also where the last line was cut short."""

from slurm import history
from slurm.history import Stop


def test_read__gives_back_what_was_appended(tmp_path):
    stops = [
        Stop(
            name="stage1", job="41", restart=0, kind="retry", reason="a", step=3, excluded=("n1",)
        ),
        Stop(name="stage1", job="41", restart=1, kind="done", reason="b"),
    ]
    for stop in stops:
        history.append(tmp_path, stop)
    assert history.read(tmp_path) == stops


def test_read__passes_over_a_line_that_was_cut_short(tmp_path):
    stop = Stop(name="stage1", job="41", restart=0, kind="done", reason="complete")
    history.append(tmp_path, stop)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"name": "stage2", "jo')
    assert history.read(tmp_path) == [stop]
    assert history.read(tmp_path / "none") == []
