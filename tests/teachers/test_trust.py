"""What comes with a teacher's weights does not run, unless the recipe or the user says so."""

import json
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from textwrap import dedent
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.system.trust import trusting_pickles
from teachers import build_teacher, resolve, teacher_spec
from teachers.presets import PRESETS
from teachers.sources import remote_code

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def build(preset, weights="", **values):
    return build_teacher("mine", TeacherConfig(preset=preset, weights=str(weights), **values))


def state_of(preset):
    tower = build(preset).tower
    return (getattr(tower, "visual", None) or tower.model).state_dict()


def line_of(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_open_clip", "tiny_clip"])
def test_pickle__runs_only_where_it_is_trusted(name, tmp_path, trap):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": state_of(name), "args": trap}, path)
    with pytest.raises(WeightsError, match=r"io\.open") as error:
        build(name, path)
    assert "--trust-checkpoint" in line_of(error)
    assert not trap.ran.exists()
    with trusting_pickles():
        build(name, path)
    assert trap.ran.exists()


@pytest.mark.parametrize("source", ["radio", "student"])
def test_pickle__runs_only_where_it_is_trusted_for_a_description_too(source, tmp_path, trap):
    """These read the file to say what the teacher is, before it is built."""
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "args": trap}, path)
    config = TeacherConfig(preset=source, weights=str(path))
    for describe in (build_teacher, teacher_spec):
        with pytest.raises(WeightsError, match=r"io\.open"):
            describe("mine", config)
        assert not trap.ran.exists()
    with trusting_pickles(), pytest.raises(WeightsError, match="RADIO"):
        teacher_spec("mine", config)
    assert trap.ran.exists()


@pytest.mark.parametrize("source", ["radio", "student", "timm", "open_clip"])
def test_pickle__a_wrong_sum_ends_before_anything_runs(source, tmp_path, trap):
    torch.save({"args": trap}, tmp_path / "w.pt")
    model = {"timm": "test_vit", "open_clip": "ViT-B-32"}.get(source)
    options = {"model": model} if model else {}
    with trusting_pickles(), pytest.raises(WeightsError, match="mine: sha256"):
        build(source, tmp_path / "w.pt", options=options, sha256="0" * 64)
    assert not trap.ran.exists()


def test_sha256__of_a_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state_of("tiny_vit"), path)
    found = sha256(path.read_bytes()).hexdigest()
    assert build("tiny_vit", path, sha256=found.upper())
    with pytest.raises(WeightsError) as error:
        build("tiny_vit", path, sha256="0" * 64)
    assert line_of(error) == (
        f"teachers.mine: sha256: {path} has sha256 {found}, not {'0' * 64}; take "
        "the file that was meant, or correct the checksum where you trust this one"
    )


def test_sha256__of_a_folder_in_several_files(tmp_path):
    state = state_of("tiny_clip")
    names = sorted(state)
    parts = {"b.safetensors": names[:9], "a.safetensors": names[9:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = [
        f"{sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(parts)
    ]
    assert build("tiny_clip", tmp_path, sha256=sha256("".join(lines).encode()).hexdigest())
    with pytest.raises(WeightsError, match=r"a\.safetensors … .*sha256"):
        build("tiny_clip", tmp_path, sha256="0" * 64)


def test_sha256__of_a_student_is_that_of_its_checkpoint(write_run):
    run = write_run()
    (meta,) = run.glob("*/checkpoints/*/meta.json")
    found = sha256(meta.read_bytes()).hexdigest()
    assert build("student", run, sha256=found).spec.channels == 64
    with pytest.raises(WeightsError, match=rf"meta\.json .*{found}"):
        build("student", run, sha256="0" * 64)


def test_sha256__of_what_a_hub_gave(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(state_of("tiny_vit"), path)
    monkeypatch.setattr("teachers.sources.timm.locate", lambda preset: path)
    options = {"model": "test_vit", "native_size": 160, **HALF}
    with pytest.raises(WeightsError, match=r"model\.safetensors .*sha256"):
        build("timm", options=options, sha256="0" * 64)


def test_sha256__without_a_file_is_refused():
    with pytest.raises(ConfigError, match=r"sha256: .*tiny_vit"):
        build("tiny_vit", sha256="0" * 64)


MODELLING = """
    from pathlib import Path
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    Path("{ran}").touch()

    class OddConfig(PreTrainedConfig):
        model_type = "odd"

        def __init__(self, width=12, patch_size=8, image_size=32, **values):
            super().__init__(**values)
            self.width, self.patch_size, self.image_size = width, patch_size, image_size

    class OddModel(PreTrainedModel):
        config_class = OddConfig

        def __init__(self, config):
            super().__init__(config)
            size = config.patch_size
            self.embed = torch.nn.Conv2d(3, config.width, size, size)
            self.token = torch.nn.Parameter(torch.zeros(1, 1, config.width))
            self.post_init()

        def forward(self, pixel_values):
            patches = self.embed(pixel_values).flatten(2).transpose(1, 2)
            token = self.token.expand(len(patches), -1, -1)
            return BaseModelOutputWithPooling(torch.cat([token, patches], 1))
    """


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A model folder that is nothing without its code; running it makes a file ``ran``."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    folder = tmp_path / tmp_path.name.replace("-", "_")
    folder.mkdir()
    ran = tmp_path / "ran"
    (folder / "modeling_odd.py").write_text(dedent(MODELLING).replace("{ran}", str(ran)))
    places = {"AutoConfig": "modeling_odd.OddConfig", "AutoModel": "modeling_odd.OddModel"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "odd", "image_size": 32, "auto_map": places})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": HALF["mean"], "image_std": HALF["std"]})
    )
    state = {
        "embed.weight": torch.randn(12, 3, 8, 8),
        "embed.bias": torch.randn(12),
        "token": torch.randn(1, 1, 12),
    }
    save_file(state, folder / "model.safetensors")
    return folder, state, ran


def test_trust_remote_code__without_the_field_nothing_runs(odd):
    folder, _, ran = odd
    for options in ({}, {"trust_remote_code": False}):
        for describe in (build_teacher, teacher_spec):
            config = TeacherConfig(preset="transformers", weights=str(folder), options=options)
            with pytest.raises(ConfigError) as error:
                describe("mine", config)
            assert line_of(error) == (
                f"teachers.mine: {folder} is built by Python files of its own "
                "(modeling_odd.OddModel); read them, then set options.trust_remote_code: true to "
                "run them"
            )
    with pytest.raises(ConfigError, match="'yes'"):
        build("transformers", folder, options={"trust_remote_code": "yes"})
    with trusting_pickles(), pytest.raises(ConfigError, match="trust_remote_code"):
        build("transformers", folder)
    assert not ran.exists()


def test_trust_remote_code__with_the_field_the_model_is_the_one_of_the_code(odd, caplog):
    folder, state, ran = odd
    teacher = build("transformers", folder, options={"trust_remote_code": True})
    assert ran.exists()
    assert f"running the code of {folder} (modeling_odd.OddModel)" in caplog.text
    spec = teacher.spec
    assert (spec.channels, spec.summary_channels, spec.patch_size) == (12, 12, 8)
    assert spec.native_size == (32, 32)
    pixels = torch.rand(2, 3, 32, 48)
    found = teacher.encode(pixels)
    expected = torch.nn.functional.conv2d(
        (pixels - 0.5) / 0.5, state["embed.weight"], state["embed.bias"], stride=8
    )
    torch.testing.assert_close(found.spatial, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.summary, state["token"][0].expand(2, -1))
    options = {"trust_remote_code": True, "summary": "token_and_mean"}
    both = build("transformers", folder, options=options)
    assert both.spec.summary_channels == 24
    expected = torch.cat([found.summary, found.spatial.mean((2, 3))], 1)
    torch.testing.assert_close(both.encode(pixels).summary, expected)
    with pytest.raises(ConfigError, match="OddModel pools nothing"):
        build("transformers", folder, options={**options, "summary": "pool"})


def test_trust_remote_code__matrices_of_half_precision_stay_as_they_are(odd):
    folder, state, _ = odd
    half = {key: value.bfloat16() for key, value in state.items()}
    options = {"trust_remote_code": True}
    config = TeacherConfig(preset="transformers", weights=str(folder), options=options)
    tower = remote_code.load_state(resolve(config), half, "here")
    assert tower.model.embed.weight.data_ptr() == half["embed.weight"].data_ptr()
    assert tower.model.token.dtype == torch.float32

    found = []
    for kind in (torch.bfloat16, torch.float32):
        same = {key: value.to(kind) for key, value in half.items()}
        save_file(same, folder / "model.safetensors")
        found.append(build("transformers", folder, options=options))
    assert found[0].spec.weights_hash == found[1].spec.weights_hash
    pixels = torch.rand(1, 3, 32, 48)
    assert torch.equal(*(teacher.encode(pixels).spatial for teacher in found))


def test_trust_remote_code__code_that_fails_is_one_line(odd):
    folder, _, _ = odd
    code = folder / "modeling_odd.py"
    code.write_text(code.read_text().replace("self.embed(pixel_values)", "self.nothing"))
    with pytest.raises(ConfigError, match=r"OddModel.*nothing") as error:
        teacher_spec("mine", TeacherConfig(preset="transformers", weights=str(folder),
                                           options={"trust_remote_code": True}))  # fmt: skip
    line_of(error)


def test_trust_remote_code__code_that_cannot_be_imported_is_one_line(odd):
    folder, _, _ = odd
    (folder / "modeling_odd.py").write_text("raise RuntimeError('no\\nluck')")
    with pytest.raises(ConfigError, match="no luck") as error:
        build("transformers", folder, options={"trust_remote_code": True})
    line_of(error)


@pytest.mark.parametrize("source", ["timm", "open_clip", "radio", "student"])
def test_trust_remote_code__other_sources_never_run_any(source):
    with pytest.raises(ConfigError, match="'trust_remote_code'"):
        build(source, options={"trust_remote_code": True})


def test_config_json__names_no_code_to_fetch(tmp_path):
    """A known model is built by transformers' own class, whatever its folder says of others."""
    teacher = build("tiny_clip")
    config = {
        **PRESETS["tiny_clip"].arguments["config"],
        "auto_map": {"AutoModel": "evil/code--modeling.Evil"},
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "experts_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    save_file(teacher.tower.model.state_dict(), tmp_path / "model.safetensors")
    found = build("transformers", tmp_path, options=HALF)
    assert found.tower.model.config._attn_implementation in ("eager", "sdpa")
    assert not hasattr(found.tower.model.config, "quantization_config")
    pixels = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(found.encode(pixels).spatial, teacher.encode(pixels).spatial)


@pytest.mark.parametrize(
    "argument",
    [{"checkpoint_path": "w.pth"}, {"pretrained": True}, {"pretrained_cfg": {"file": "w.pth"}}],
)
@pytest.mark.parametrize("place", ["options.create", "config.json"])
def test_timm__is_not_told_to_unpickle(argument, place, tmp_path, trap):
    torch.save({"x": trap}, tmp_path / "w.pth")
    argument = json.loads(json.dumps(argument).replace("w.pth", str(tmp_path / "w.pth")))
    published = {"input_size": [3, 160, 160], **HALF}
    settings = {"architecture": "test_vit", "pretrained_cfg": published}
    if place == "config.json":
        settings["model_args"] = argument
    (tmp_path / "config.json").write_text(json.dumps(settings))
    options = {"create": argument} if place == "options.create" else {}
    config = TeacherConfig(preset="timm", weights=str(tmp_path), options=options)
    with pytest.raises(ConfigError, match=f"{next(iter(argument))}"):
        resolve(config)
    assert not trap.ran.exists()


@pytest.mark.parametrize(
    "towers",
    [
        {"text_cfg": {"hf_model_name": "evil/text"}, "vision_cfg": {}},
        {"text_cfg": {}, "vision_cfg": {"timm_model_name": "x", "timm_model_pretrained": True}},
    ],
)
def test_open_clip__names_no_tower_to_fetch(towers):
    with pytest.raises(ConfigError, match="library"):
        build(
            "open_clip", options={"native_size": 48, **HALF, "config": {"embed_dim": 8, **towers}}
        )


class Gate(BaseHTTPRequestHandler):
    """A hub that refuses everyone, and repeats in its answer what it was sent."""

    def do_GET(self):
        told = f"refused {self.headers.get('authorization')}".encode()
        self.send_response(403)
        for name in ("X-Error-Message", "Content-Type"):
            self.send_header(name, told.decode())
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told if self.command == "GET" else b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def gate(tmp_path, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Gate)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yield address
    server.shutdown()
    thread.join()


@pytest.mark.parametrize("token", ["hf_" + "Ab12" * 9, "an-odd-token-of-a-mirror"])
@pytest.mark.parametrize("preset", ["dinov2_l_reg", "sam3", "dfn_clip_h14_378"])
def test_hub__its_refusal_repeats_no_token(preset, token, gate, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError, match="weights") as error:
        build(preset)
    assert token not in line_of(error) + caplog.text + "".join(capfd.readouterr())
