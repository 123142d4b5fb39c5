"""An export folder is whole or absent, and holds the student to the last bits."""

import resource
import signal

import pytest
import torch

from radio_distill.errors import ExportError
from radio_distill.export import format_named
from radio_distill.export.write import check_equal, export, new_folder, probe_images


def test_new_folder__appears_when_all_is_written(tmp_path):
    with new_folder(tmp_path / "a" / "b") as draft:
        (draft / "file").write_text("x")
        (draft / "file").chmod(0o600)
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o644, "others may load it"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_new_folder__nothing_is_left_of_a_failure(tmp_path):
    def fail():
        with new_folder(tmp_path / "b") as draft:
            (draft / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(tmp_path.iterdir())


def test_new_folder__nothing_is_written_over(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ExportError, match="exists"):
        new_folder(tmp_path).__enter__()
    with pytest.raises(ExportError, match="exists"):
        new_folder(tmp_path / "kept").__enter__()
    assert (tmp_path / "kept").read_text() == "x"


def test_new_folder__a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="Not a directory"):
        new_folder(tmp_path / "file" / "b").__enter__()


@pytest.fixture
def full_disk():
    """Let no file grow beyond 100 kB: writing fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["transformers", "radio"])
def test_export__a_full_disk(make_student, tmp_path, request, name):
    student = make_student(architecture="vit_tiny_patch16_224")
    request.getfixturevalue("full_disk")
    with pytest.raises(ExportError, match="out"):
        export(student, tmp_path / "out", format_named(name))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_check_equal__small_values_are_compared_absolutely():
    wanted = {"summary": torch.tensor([0.5, -0.25])}
    found = {"summary": torch.tensor([0.5, -0.25 + 2**-12])}
    assert check_equal("onnx", wanted, found, 1e-3) == 2**-12


def test_check_equal__large_values_are_compared_relatively():
    wanted = {"a": torch.zeros(2), "features": torch.tensor([0.0, -512.0])}
    found = {"a": torch.zeros(2), "features": torch.tensor([1.0, -512.0])}
    assert check_equal("onnx", wanted, found, 2**-9) == 2**-9
    with pytest.raises(ExportError, match=r"timm: features.* 2\.0e-03.* 1e-03"):
        check_equal("timm", wanted, found, 1e-3)


def test_check_equal__refuses_what_is_not_finite():
    with pytest.raises(ExportError, match="nan"):
        check_equal("onnx", {"a": torch.zeros(1)}, {"a": torch.tensor([torch.nan])}, 1e-3)


def test_probe_images__are_the_same_every_time():
    shapes = [(1, (2, 3)), (2, (1, 1))]
    first, second = (list(probe_images(8, shapes, 3)) for _ in range(2))
    assert [tuple(images.shape) for images in first] == [(1, 3, 16, 24), (2, 3, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(0 <= images.min() <= images.max() <= 1 for images in first)
