"""An export folder is whole or absent."""

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from radio_distill.errors import ExportError
from radio_distill.export import format_named
from radio_distill.export.files import new_folder
from radio_distill.export.folded import FoldedStudent


def test_new_folder__appears_when_all_is_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as draft:
        (draft / "file").write_text("x")
        (draft / "file").chmod(0o600)
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o644, "others may load it"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_new_folder__nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "b") as draft:
            (draft / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(tmp_path.iterdir())


def test_new_folder__nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ExportError, match="exists already; choose another folder"):
        new_folder(tmp_path).__enter__()
    with pytest.raises(ExportError, match="exists already"):
        new_folder(tmp_path / "kept").__enter__()
    assert (tmp_path / "kept").read_text() == "x"


def test_new_folder__a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"cannot write .*: Not a directory"):
        new_folder(tmp_path / "file" / "b").__enter__()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 100 kB: writing fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["transformers", "radio"])
def test_export__a_full_disk(
    make_student: Callable[..., FoldedStudent],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    student = make_student(architecture="vit_tiny_patch16_224")
    request.getfixturevalue("full_disk")
    with pytest.raises(ExportError, match=r"cannot write .*out"):
        format_named(name).export(student, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
