"""A teacher starts without random weights, in memory of its own, and its file is hashed once."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from radio_distill.config import TeacherConfig
from teachers import build_module, build_teacher, resolve, weights
from teachers.presets import TINY
from teachers.sources.transformers import load_state
from teachers.weights import WithoutValues, fingerprint, load_strict


@pytest.fixture(autouse=True)
def files_settle_at_once(monkeypatch):
    monkeypatch.setattr(weights, "SETTLED", -1.0)


def write(name, path, seed=5):
    """Save a tower's weights as its library names them, none of them the preset's own."""
    tower = build_module(TeacherConfig(preset=name), "cpu")
    module = getattr(tower, "visual", None) or tower.model
    draws = torch.Generator().manual_seed(seed)
    state = {
        key: value + 0.1 * torch.randn(value.shape, generator=draws)
        if value.is_floating_point()
        else value
        for key, value in module.state_dict().items()
    }
    save_file(state, path)
    return TeacherConfig(preset=name, weights=str(path), dtype="float32")


def check_like_built_with_memory(teacher, config):
    tower = build_module(config, "cpu").requires_grad_(False)
    tower.load_state_dict(teacher.tower.state_dict())
    mine, ordinary = dict(teacher.tower.named_buffers()), dict(tower.named_buffers())
    assert mine.keys() == ordinary.keys()
    assert all(torch.equal(mine[key], ordinary[key]) for key in mine)
    spec = teacher.spec
    sizes = [] if spec.fixed_size else [(3 * spec.patch_size, 2 * spec.patch_size)]
    if max(spec.native_size) < 100:  # else it takes long
        sizes.append(spec.native_size)
    for size in sizes:
        pixels = torch.rand(2, 3, *size)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
        with torch.no_grad():
            summary, spatial = tower((pixels - mean) / std)
        features = teacher.encode(pixels)
        assert torch.equal(features.spatial, spatial)
        assert summary is None or torch.equal(features.summary, summary)


@pytest.mark.parametrize(
    "name", [name for name in TINY if name not in ("tiny_student", "tiny_radio")]
)
def test_build_teacher__computes_what_a_module_built_with_memory_does(name, tmp_path):
    config = write(name, tmp_path / "w.safetensors")
    check_like_built_with_memory(build_teacher("t", config), config)


@pytest.mark.parametrize(
    "name", [name for name in TINY if name not in ("tiny_student", "tiny_radio")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_build_teacher__of_half_precision_is_that_of_the_same_values(name, dtype, tmp_path):
    state = load_file(write(name, tmp_path / "w.safetensors").weights)
    halves = {key: it.bfloat16() if it.is_floating_point() else it for key, it in state.items()}
    teachers = []
    for kind in (torch.bfloat16, torch.float32):
        path = tmp_path / f"{kind}.safetensors"
        same = {key: it.to(kind) if it.is_floating_point() else it for key, it in halves.items()}
        save_file(same, path)
        config = TeacherConfig(preset=name, weights=str(path), dtype=dtype)
        teachers.append(build_teacher("t", config))
    half, whole = (teacher.tower.state_dict() for teacher in teachers)
    assert all(torch.equal(half[key], whole[key]) for key in whole)
    assert [half[key].dtype for key in whole] == [value.dtype for value in whole.values()]
    assert teachers[0].spec.weights_hash == teachers[1].spec.weights_hash


def test_load_strict__takes_matrices_of_half_precision_as_they_are():
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    state = {key: value.bfloat16() for key, value in layers.state_dict().items()}
    load_strict(layers, state, "here", take=True)
    assert layers[0].weight.data_ptr() == state["0.weight"].data_ptr()
    assert layers[1].weight.dtype == torch.float32


def loaded_by_transformers(dtype_of, preset="tiny_dinov2", **more):
    """Return tensors of a tower, each in its own type, and those that it was loaded with."""
    settings = resolve(TeacherConfig(preset=preset)).arguments["config"]
    tower = build_module(TeacherConfig(preset=preset), "cpu")
    state = tower.model.state_dict()
    state = {
        key: (it + 1e-3 * torch.rand(it.shape)).to(dtype_of(it)) if it.is_floating_point() else it
        for key, it in state.items()
    }
    return load_state(settings, state | more, "here").model.state_dict(), state


def test_load_state__transformers_takes_matrices_of_half_precision_as_they_are():
    tower, state = loaded_by_transformers(lambda _: torch.bfloat16)
    name = next(key for key in state if key.endswith("fc1.weight"))
    assert tower[name].data_ptr() == state[name].data_ptr(), "maybe still in its file"
    norm = next(key for key in state if key.endswith("norm1.weight"))
    assert tower[norm].dtype == torch.float32


def test_load_state__radio_brings_its_normalisation_in_float32():
    beside = {
        f"input_conditioner.norm_{name}": torch.full((3, 1, 1), 0.3) for name in ("mean", "std")
    }
    tower, state = loaded_by_transformers(lambda _: torch.bfloat16, "tiny_radio", **beside)
    matrices = [key for key in state if key.endswith("fc1.weight")]
    assert matrices
    assert all(tower[key].data_ptr() == state[key].data_ptr() for key in matrices)


def test_load_state__of_a_file_of_mixed_types_loses_nothing():
    def dtype_of(value):
        return torch.bfloat16 if value.ndim > 1 else torch.float32

    tower, state = loaded_by_transformers(dtype_of)
    assert all(torch.equal(tower[key], value.to(tower[key].dtype)) for key, value in state.items())
    assert all(tower[key].dtype == torch.float32 for key, it in state.items() if it.ndim == 1)


@pytest.mark.parametrize("name", ["vits14_packaged", "efficientnet_lite0_packaged"])
def test_build_teacher__of_a_package_too(name):
    config = TeacherConfig(preset=name, dtype="float32")
    check_like_built_with_memory(build_teacher("t", config), config)


ONE = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("model", "few"),
    [("swin_tiny_patch4_window7_224", {"depths": ONE}), ("eva02_tiny_patch14_224", {"depth": 1}),
     ("beit_base_patch16_224", {"depth": 1}), ("swinv2_tiny_window8_256", {"depths": ONE}),
     ("maxvit_tiny_rw_224", {"depths": ONE}), ("vit_small_patch16_dinov3", {"depth": 1})],
)  # fmt: skip
def test_without_values__keeps_the_buffers_that_no_file_has(model, few):
    import timm

    with WithoutValues():
        bare = timm.create_model(model, **few)
    whole = timm.create_model(model, **few)
    buffers = dict(bare.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in whole.named_buffers())


def test_build_teacher__leaves_the_callers_random_numbers_alone(tmp_path):
    config = write("tiny_vit", tmp_path / "w.safetensors")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_teacher("t", config)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt"])
def test_build_teacher__outlives_its_file(file, tmp_path):
    config = write("tiny_vit", tmp_path / "w.safetensors")
    if file == "w.pt":
        from safetensors.torch import load_file

        torch.save(load_file(tmp_path / "w.safetensors"), tmp_path / file)
        config = TeacherConfig(preset="tiny_vit", weights=str(tmp_path / file))
    teacher = build_teacher("t", config)
    before = teacher.encode(torch.ones(1, 3, 48, 48)).spatial
    (tmp_path / file).write_bytes(b"\0" * (tmp_path / file).stat().st_size)
    assert torch.equal(teacher.encode(torch.ones(1, 3, 48, 48)).spatial, before)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_open_clip", "tiny_clip", "tiny_siglip"])
def test_build_teacher__stores_every_matrix_in_its_dtype(name):
    """The products of Q, K and V of open_clip are no Linear; norms and tokens stay float32."""
    teacher = build_teacher("t", TeacherConfig(preset=name, dtype="bfloat16"))
    matrices = {
        key: value.dtype
        for key, value in teacher.tower.named_parameters()
        if value.ndim >= 2
        and not any(word in key for word in ("embed", "token", "probe", "latent"))
    }
    matrices.pop("visual.proj", None)  # a parameter of one product an image
    assert set(matrices.values()) == {torch.bfloat16}, matrices
    assert next(v for k, v in teacher.tower.named_parameters() if "norm" in k or "ln" in k).dtype \
        == torch.float32  # fmt: skip


def counted(monkeypatch):
    """Count how often a teacher's tensors are hashed."""
    import teachers.weights

    hashes = []

    def hash_of(module):
        hashes.append(module)
        return fingerprint(module)

    monkeypatch.setattr(teachers.weights, "fingerprint", hash_of)
    return hashes


def test_fingerprint__is_hashed_once_for_a_file(tmp_path, monkeypatch):
    config, hashes = write("tiny_vit", tmp_path / "w.safetensors"), counted(monkeypatch)
    first = build_teacher("t", config)
    second = build_teacher("t", config)
    assert first.spec.weights_hash == second.spec.weights_hash == fingerprint(first.tower)
    assert len(hashes) == 1
    fewer = TeacherConfig(preset="tiny_vit", weights=config.weights, options={"blocks": 1})
    assert build_teacher("t", fewer).spec.weights_hash != first.spec.weights_hash
    assert len(hashes) == 2


def test_fingerprint__a_changed_file_never_passes(tmp_path, monkeypatch):
    """Not one of the same size and time either, written over or put in its place."""
    path = tmp_path / "w.safetensors"
    config, hashes = write("tiny_vit", path), counted(monkeypatch)
    found = {build_teacher("t", config).spec.weights_hash}
    before, other = path.stat(), tmp_path / "other"
    write("tiny_vit", other, seed=6)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    found.add(build_teacher("t", config).spec.weights_hash)
    write("tiny_vit", other, seed=7)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found.add(build_teacher("t", config).spec.weights_hash)
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert len(found) == len(hashes) == 3


def test_fingerprint__of_a_file_that_was_just_written_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SETTLED", 10.0)
    config, hashes = write("tiny_vit", tmp_path / "w.safetensors"), counted(monkeypatch)
    build_teacher("t", config)
    build_teacher("t", config)
    assert len(hashes) == 2


def test_fingerprint__a_file_that_changes_while_it_is_read_is_not_noted(tmp_path):
    path = tmp_path / "w.safetensors"
    config = write("tiny_vit", path)
    note = weights.FingerprintNote(resolve(config), [path])
    os.utime(path)
    assert note.fingerprint(lambda: "0" * 64) == "0" * 64
    assert not note.path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}'])
def test_fingerprint__a_damaged_note_is_written_anew(content, tmp_path):
    path = tmp_path / "w.safetensors"
    config = write("tiny_vit", path)
    note = weights.FingerprintNote(resolve(config), [path])
    note.path.write_text(content)
    assert note.fingerprint(lambda: "1" * 64) == "1" * 64
    assert weights.FingerprintNote(resolve(config), [path]).fingerprint(str) == "1" * 64


def test_fingerprint__a_folder_that_cannot_be_written_is_hashed_each_time(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    config, hashes = write("tiny_vit", path), counted(monkeypatch)
    note = weights.FingerprintNote(resolve(config), [path]).path
    note.mkdir()  # holds for root too, unlike permissions
    assert len({build_teacher("t", config).spec.weights_hash for _ in range(2)}) == 1
    assert len(hashes) == 2
