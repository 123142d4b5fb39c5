"""What is written is what is loaded: runs, exports, published models, configs."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import radio_distill
from radio_distill.config import Recipe, StudentConfig, load, of_summary
from radio_distill.errors import CheckpointError, ConfigError, UnknownNameError, WeightsError
from radio_distill.export.folded import folded
from radio_distill.normalize.normalizers import Identity, normalizers_of
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.restore import load_student
from radio_distill.train.stage_folders import write_stages
from radio_distill.weights.files import find_checkpoint

SIZES = [(64, 64), (64, 96), (48, 32)]


def same(left, right, heads=(), tolerance=1e-6):
    """Compare two backbones; returns whether anything is in the comparison at all."""
    for size in SIZES:
        pixels = torch.rand(1, 3, *size)
        with torch.no_grad():
            one, two = left(pixels, heads), right(pixels, heads)
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)
    return one.summary.numel() and one.features.numel()


@torch.no_grad()
def test_load__a_run_is_its_student_with_folded_heads(write_run):
    run = write_run()
    model = radio_distill.load(run)
    reference = folded(checkpoints.find(run / "stage1")).model
    pixels = torch.rand(2, 3, 64, 96)
    output = model(pixels, model.head_names)
    tokens, spatial = reference.student(pixels)
    torch.testing.assert_close(output.features, spatial, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.summary, tokens[:, [0, 2]].flatten(1), rtol=0, atol=1e-6)
    for name, found in reference(pixels, ("clip", "sam", "dino")).features.items():
        torch.testing.assert_close(output.heads[name], found, rtol=0, atol=1e-6)
    assert (model.native_size, model.training) == (96, False)
    assert model.teachers["dino"].licence == "dinov3-license"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load__run_stage_checkpoints_and_checkpoint_are_one(write_run):
    run = write_run()
    whole = radio_distill.load(run)
    for path in ("stage1", "stage1/checkpoints", "stage1/checkpoints/step-00000007"):
        assert same(radio_distill.load(str(run / path)), whole)


def test_load__takes_the_last_stage_and_not_what_was_moved_aside(write_run):
    run = write_run()
    write_run(stage="stage2")
    shutil.copytree(run / "stage1", run / "stage3.1")
    stage = checkpoints.find(run / "stage2")
    assert find_checkpoint(run).folder == stage.folder
    for name in ("stage3-tile", "stage3-bilinear"):
        shutil.copytree(run / "stage1", run / name)
    with pytest.raises(CheckpointError, match="stage3-bilinear, stage3-tile"):
        radio_distill.load(run)


def test_load__the_order_of_stages_is_that_of_the_recipe_whatever_their_names(write_run):
    run = write_run(stage="proxy")
    with pytest.raises(CheckpointError, match="name one: proxy"):
        radio_distill.load(run)  # of an earlier version
    assert radio_distill.load(run / "proxy").head_names == ("clip", "sam", "dino")
    for name in ("high-tile.1", "high.low", "alone"):
        shutil.copytree(run / "proxy", run / name)
    write_stages(run, ["proxy", "high", "high.low", "never trained"])
    assert find_checkpoint(run).folder.parents[1].name == "high.low"
    shutil.copytree(run / "proxy", run / "high.low-tile")
    with pytest.raises(CheckpointError, match=r"name one: high\.low, high\.low-tile"):
        find_checkpoint(run)
    (run / "stages.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"stages\.json is damaged"):
        find_checkpoint(run)
    assert find_checkpoint(run / "high.low").step == 7


def test_load__a_spectral_run_is_folded(write_run):
    run = write_run(spectral_reparametrization=True)
    model = radio_distill.load(run)
    assert not any("spectral" in name for name in model.state_dict())
    reference = folded(checkpoints.find(run / "stage1")).model.student
    with torch.no_grad():
        pixels = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(model(pixels).features, reference(pixels)[1], rtol=0, atol=1e-6)
    assert same(radio_distill.load(run, heads=()), model)


@pytest.mark.parametrize("what", ["run", "export"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")])
def test_load__whatever_the_process_makes_new_tensors_of(write_run, tmp_path, what, default):
    """In bfloat16 weights were rounded on their way, and without data they could not be read."""
    from radio_distill.export.transformers import Transformers
    from radio_distill.export.write import export

    path = write_run()
    if what == "export":
        path = export(folded(checkpoints.find(path / "stage1")), tmp_path / "e", Transformers())
    state = torch.get_rng_state()
    expected = radio_distill.load(path)
    assert torch.equal(torch.get_rng_state(), state), "what is drawn afterwards is what it was"
    if isinstance(default, torch.device):
        with default:
            model = radio_distill.load(path)
    else:
        torch.set_default_dtype(default)
        try:
            model = radio_distill.load(path)
            assert torch.get_default_dtype() == default
        finally:
            torch.set_default_dtype(torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert same(model, expected, model.head_names)


def test_load__keeps_only_the_heads_that_are_named(write_run):
    run = write_run()
    model = radio_distill.load(run, heads=("dino",))
    assert model.head_names == ("dino",)
    assert same(model, radio_distill.load(run), ("dino",))
    with pytest.raises(UnknownNameError, match=r"'dine'.*'dino'"):
        radio_distill.load(run, heads=("dine",))


HEADS = {
    "clip": {"summary": {"name": "ladder"}, "features": {"name": "ln_mlp"}},
    "sam": {"features": {"name": "conv"}},
    "dino": {
        "summary": {"name": "shared"},
        "features": {"name": "attention", "options": {"heads": 2}},
    },
}


@pytest.mark.parametrize(
    "student",
    [
        {"architecture": "test_vit"},
        {"architecture": "test_vit2"},
        {"architecture": "test_vit", "heads": HEADS},
    ],
)
def test_load__an_export_equals_the_run(write_run, tmp_path, student):
    from radio_distill.export.transformers import Transformers
    from radio_distill.export.write import export

    run = write_run(**student)
    export(folded(checkpoints.find(run / "stage1")), tmp_path / "export", Transformers())
    model, whole = radio_distill.load(tmp_path / "export"), radio_distill.load(run)
    assert model.teachers == whole.teachers
    assert (model.native_size, model.config) == (whole.native_size, whole.config)
    assert same(model, whole, model.head_names, tolerance=1e-5)


@pytest.mark.parametrize("summaries", ["none", "per_channel_standardise"])
@torch.no_grad()
def test_load__every_head_predicts_in_its_teachers_spaces(write_run, tmp_path, summaries):
    """What it said in the normalised spaces, brought back by the normalizers themselves."""
    from radio_distill.export.transformers import Transformers
    from radio_distill.export.write import export

    run = write_run(heads=HEADS, summaries=summaries)
    checkpoint = checkpoints.find(run / "stage1")
    pixels = torch.rand(2, 3, 64, 96)
    trained = load_student(checkpoint, torch.device("cpu"))
    model, normalizers = radio_distill.load(run), normalizers_of(checkpoint)
    output = model(pixels, model.head_names).heads
    for name, (summary, spatial) in trained(pixels, tuple(HEADS)).features.items():
        expected = normalizers[name].invert(spatial)
        torch.testing.assert_close(output[name].spatial, expected, rtol=1e-4, atol=1e-4)
        if summary is not None:
            own = normalizers.get(of_summary(name), Identity())
            expected = own.invert(summary[:, :, None, None])[:, :, 0, 0]
            torch.testing.assert_close(output[name].summary, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model.summarize(pixels, name), output[name].summary)
    export(folded(checkpoint), tmp_path / "export", Transformers())
    assert same(radio_distill.load(tmp_path / "export"), model, model.head_names, tolerance=1e-5)


def test_load__an_export_is_not_what_its_training_started_from(write_run, tmp_path):
    from radio_distill.export.transformers import Transformers
    from radio_distill.export.write import export

    run = write_run(pretrained_sha256="ab" * 32)
    export(folded(checkpoints.find(run / "stage1")), tmp_path / "export", Transformers())
    model, whole = radio_distill.load(tmp_path / "export"), radio_distill.load(run)
    assert model.config == whole.config
    assert model.config.pretrained_sha256 == ""


def radio_model(**fields):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.RadioConfig(
        **{"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "patch_size": 16,
           "max_img_size": 128, "num_cls_tokens": 3, "num_registers": 2, "summary_idxs": [0, 2],
           "norm_mean": (0.1, 0.2, 0.3), "norm_std": (0.4, 0.5, 0.6), "initializer_range": 0.1,
           **fields}
    )  # fmt: skip
    model = transformers.RadioModel(config).eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def check_equals_radio(model, reference):
    for size in SIZES:
        pixels = torch.rand(1, 3, *size)
        expected, found = reference(pixels), model(pixels, format="NLC")
        scale = expected.features.abs().max()
        assert (found.features - expected.features).abs().max() <= 1e-5 * scale
        assert (found.summary - expected.summary).abs().max() <= 1e-5 * scale


def test_load__a_radio_folder_equals_transformers(tmp_path):
    reference = radio_model()
    reference.save_pretrained(tmp_path)
    model = radio_distill.load(tmp_path)
    assert (model.head_names, model.teachers, model.max_size) == ((), {}, 128)
    check_equals_radio(model, reference)


def test_load__a_torch_hub_file_equals_transformers(tmp_path):
    """Under the published names, LayerScale as the hub's code calls it, the norm in the file."""
    reference = radio_model()
    state = {}
    names = {
        "embeddings.patch_projection": "patch_generator.embedder",
        "embeddings.position_embedding": "patch_generator.pos_embed",
        "embeddings.cls_register_token": "patch_generator.cls_token.token",
        "encoder.layer": "blocks",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.grandma",
        "layer_scale2.lambda1": "ls2.grandma",
    }
    own = reference.state_dict()
    for key, value in own.items():
        if "q_proj" in key:
            value = torch.cat([own[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            key = key.replace("attention.q_proj", "attn.qkv")
        for old, new in names.items():
            key = key.replace(old, new)
        state[key if key.startswith("input_conditioner") else f"base_model.{key}"] = value
    state = {key: value for key, value in state.items() if "_proj" not in key}
    teachers = [{"name": "a"}, {"name": "b", "use_summary": False}, {"name": "c"}]
    file = tmp_path / "radio.pth.tar"
    torch.save({"state_dict": state, "args": Namespace(teachers=teachers)}, file)
    check_equals_radio(radio_distill.load(file), reference)


def test_load__what_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        radio_distill.load(tmp_path / "empty")
    with pytest.raises(WeightsError, match="absent"):
        radio_distill.load(tmp_path / "absent")
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="RADIO"):
        radio_distill.load(tmp_path / "w.safetensors")


def test_load__a_folder_of_another_librarys_model_says_whose_it_is(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path)
    with pytest.raises(WeightsError, match="test_vit: a model for timm"):
        radio_distill.load(tmp_path)
    with pytest.raises(CheckpointError, match="is a model folder; name the run"):
        find_checkpoint(tmp_path)


def test_load__a_radio_of_sizes_that_timm_does_not_know(tmp_path):
    radio_model(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="width 192, depth 1") as caught:
        radio_distill.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_load__an_export_that_was_tampered_with(write_run, tmp_path):
    from radio_distill.export.transformers import Transformers
    from radio_distill.export.write import export

    folder = tmp_path / "export"
    export(folded(checkpoints.find(write_run() / "stage1")), folder, Transformers())
    whole = (folder / "radio_distill.json").read_text()
    save_file({"clip.spatial.fc1.bias": torch.zeros(16)}, folder / "adaptors.safetensors")
    with pytest.raises(WeightsError, match="heads"):
        radio_distill.load(folder)
    described = json.loads(whole)
    del described["teachers"]
    (folder / "radio_distill.json").write_text(json.dumps(described))
    with pytest.raises(WeightsError, match="export"):
        radio_distill.load(folder)


DEMO = Path(__file__).resolve().parents[2] / "radio_distill/config/recipes/demo.yaml"


@torch.no_grad()
def test_from_config__a_student_a_recipe_and_its_file():
    alone = radio_distill.from_config(StudentConfig(architecture="test_vit", max_size=64))
    assert alone(torch.rand(1, 3, 32, 32)).summary.shape == (1, 64)
    recipe: Recipe = load(DEMO)
    named = radio_distill.from_config(recipe)
    assert named.student.num_summary_tokens == len(recipe.teachers)
    assert named.config.architecture == recipe.student.architecture
    assert named(torch.rand(1, 3, 32, 32)).summary.shape == (1, 2 * named.embed_dim)
    assert radio_distill.from_config(DEMO).config == named.config


def test_from_config__reads_no_weights():
    config = StudentConfig(architecture="test_vit", max_size=64, pretrained="/absent")
    assert radio_distill.from_config(config).config.pretrained == ""


def test_from_config__no_such_file():
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        radio_distill.from_config("nothing.yaml")
    with pytest.raises(AttributeError, match="'lode'"):
        radio_distill.lode  # noqa: B018
