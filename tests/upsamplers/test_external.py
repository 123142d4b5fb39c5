"""Adapters to other projects' upsamplers, on stand-ins with the signatures of the real ones."""

import sys
from hashlib import sha256
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import upsamplers
from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.protocols import Upsampler
from radio_distill.system.trust import trusting_pickles
from radio_distill.types import TeacherSpec
from teachers import build_teacher
from teachers.base import FrozenTeacher
from upsamplers.external import AnyUp, Jafar, LoftUp, Naf, UpliftPublished

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])

ANYUP_MODEL = """
    import torch
    import torch.nn.functional as F

    class AnyUp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(1))
            self.seen = []

        def forward(self, image, features, output_size=None, vis_attn=False, q_chunk_size=None):
            self.seen.append((image, output_size, q_chunk_size, self.training))
            return self.gain * F.interpolate(features, output_size, mode="nearest")
    """
ANYUP_HUB = """
    dependencies = ["torch"]
    from anyup.model import AnyUp

    def anyup_multi_backbone(use_natten=False, pretrained=True, device="cpu"):
        model = AnyUp()
        model.pretrained = pretrained
        return model.to(device).train()

    def broken(use_natten=False, pretrained=True, device="cpu"):
        raise OSError("no weights here")
    """
NAF_HUB = """
    dependencies = ["torch", "{needs}"]
    from src.model.naf import NAF

    def naf(pretrained=True, device="cpu"):
        return NAF().to(device)
    """
NAF_MODEL = """
    import torch
    import torch.nn.functional as F

    class NAF(torch.nn.Module):
        def forward(self, image, features, output_size, return_weights=False):
            return F.interpolate(features, output_size, mode="nearest")
    """
LOFTUP_HUB = """
    from upsamplers.upsamplers import LoftUp

    def loftup_dinov2s(pretrained=True, progress=True, **kwargs):
        return LoftUp(32)
    """
LOFTUP_MODEL = """
    import torch
    import torch.nn.functional as F

    class LoftUp(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm = torch.nn.LayerNorm(dim)

        def forward(self, lr_feats, img):
            lr_feats = self.norm(lr_feats.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return F.interpolate(lr_feats, img.shape[-2:], mode="nearest") + img.amax()
    """
JAFAR_MODEL = """
    import torch
    import torch.nn.functional as F
    from utils.img import SCALE

    class JAFAR(torch.nn.Module):
        def __init__(self, input_dim=3, qk_dim=128, v_dim=384):
            super().__init__()
            self.key_features_encoder = torch.nn.Sequential(
                torch.nn.Conv2d(v_dim, qk_dim, 1, bias=False)
            )

        def forward(self, image, features, output_size):
            self.key_features_encoder(features)
            return SCALE * F.interpolate(features, output_size, mode="nearest")
    """

UPLIFT_HUB = """
    dependencies = ["torch"]

    def uplift_dinov2_s14(pretrained=True, include_extractor=True, fast=False, **kwargs):
        from uplift.hub_loader import load_model
        return load_model("dinov2-s14", pretrained, include_extractor, fast=fast, **kwargs)
    """
UPLIFT_LOADER = """
    import torch
    from torchvision.transforms.functional import resize

    class UPLiFT(torch.nn.Module):
        def __init__(self, pretrained):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(1))
            self.pretrained, self.iters, self.seen = pretrained, 1, []

        def enable_iterative(self, iters):
            assert iters > 0
            self.iters = iters

        def forward(self, img, x, outsize=None):
            self.seen.append((img, outsize))
            for _ in range(self.iters):
                x = self.gain * x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            return x if outsize is None else resize(x, outsize)

    def load_model(variant, pretrained=True, include_extractor=True, fast=False, **kwargs):
        assert not include_extractor, "it would load a backbone of its own"
        return UPLiFT(pretrained)
    """


def repository(folder, files):
    """Write ``{module: source}`` into a folder, as a clone has it."""
    for name, text in files.items():
        path = folder / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return str(folder)


@pytest.fixture
def anyup(tmp_path):
    return repository(tmp_path / "anyup-main", {"hubconf": ANYUP_HUB, "anyup.model": ANYUP_MODEL})


@pytest.fixture
def loftup(tmp_path):
    modules = {"upsamplers.__init__": "", "upsamplers.upsamplers": LOFTUP_MODEL}
    return repository(tmp_path / "loftup", {"hubconf": LOFTUP_HUB, **modules})


@pytest.fixture
def jafar(tmp_path):
    modules = {"src.upsampler.jafar": JAFAR_MODEL, "utils.img": "SCALE = 1"}
    return repository(tmp_path / "JAFAR", modules)


@pytest.fixture
def uplift(tmp_path):
    modules = {"uplift.__init__": "", "uplift.hub_loader": UPLIFT_LOADER}
    return repository(tmp_path / "UPLiFT", {"hubconf": UPLIFT_HUB, **modules})


@pytest.fixture(scope="module")
def teacher():
    return build_teacher("tiny_vit", TeacherConfig(preset="tiny_vit"))


def nearest(teacher, pixels, size, grid):
    small = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(teacher.encode(small).spatial, grid, mode="nearest")


def test_anyup__gets_what_its_authors_ask_for(anyup, teacher):
    upsampler = AnyUp(3, repository=anyup, q_chunk_size=16)
    pixels = torch.rand(2, 3, 50, 70)
    summary, spatial = upsampler(teacher, pixels, (6, 9))
    assert isinstance(upsampler, Upsampler)
    assert upsampler.cost((6, 9)) == 1
    torch.testing.assert_close(spatial, nearest(teacher, pixels, (16, 24), (6, 9)))
    assert spatial.is_contiguous(memory_format=torch.channels_last)
    assert not spatial.requires_grad
    assert summary.shape == (2, teacher.spec.summary_channels)
    image, size, chunk, training = upsampler.network.seen[1]
    assert (size, chunk, training) == ((6, 9), 16, False)
    large = F.interpolate(pixels, (48, 72), mode="bicubic", antialias=True).clamp(0, 1)
    expected = (large[1:] - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(image, expected)
    assert len(upsampler.network.seen) == 2


def test_anyup__factor_one_is_the_teacher(anyup, teacher):
    pixels = torch.rand(1, 3, 16, 24)
    upsampler = AnyUp(1, repository=anyup)
    torch.testing.assert_close(
        upsampler(teacher, pixels, (2, 3)).spatial, teacher.encode(pixels).spatial
    )
    assert upsampler.network.seen == []


def test_anyup__a_checkpoint_replaces_its_own_weights(anyup, tmp_path):
    torch.save({"gain": torch.tensor([2.0])}, tmp_path / "anyup.pth")
    assert AnyUp(2, repository=anyup).network.pretrained
    upsampler = AnyUp(2, repository=anyup, checkpoint=str(tmp_path / "anyup.pth"))
    assert not upsampler.network.pretrained
    assert upsampler.network.gain == 2


def test_anyup__an_installed_package_is_used(tmp_path, monkeypatch, teacher):
    repository(tmp_path / "site", {"anyup.__init__": "", "anyup.model": ANYUP_MODEL})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ConfigError, match=r"`checkpoint`"):
        AnyUp(2)
    torch.save({"gain": torch.tensor([3.0])}, tmp_path / "anyup.pth")
    upsampler = AnyUp(2, checkpoint=str(tmp_path / "anyup.pth"))
    for name in ("anyup", "anyup.model"):
        sys.modules.pop(name)
    pixels = torch.rand(1, 3, 16, 16)
    expected = 3 * nearest(teacher, pixels, (16, 16), (4, 4))
    torch.testing.assert_close(upsampler(teacher, pixels, (4, 4)).spatial, expected)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (AnyUp, "wimmerth/anyup"),
        (Jafar, "PaulCouairon/JAFAR"),
        (LoftUp, "andrehuang/loftup"),
        (Naf, "valeoai/NAF"),
        (UpliftPublished, "mwalmer-umd/UPLiFT"),
    ],
)
def test_external__says_how_to_get_what_is_missing(kind, source, tmp_path):
    with pytest.raises(ConfigError) as error:
        kind(2)
    message = str(error.value)
    assert f"`git clone https://github.com/{source}`" in message
    assert "`repository`" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match="nowhere"):
        kind(2, repository=str(tmp_path / "nowhere"))


def test_external__a_folder_that_is_not_a_clone(tmp_path):
    with pytest.raises(ConfigError, match=r"'naf'.*: No such file"):
        Naf(2, repository=str(tmp_path))
    with pytest.raises(ConfigError, match="`checkpoint`"):
        Jafar(2, repository=str(tmp_path))


def test_external__a_broken_or_unknown_entry(anyup):
    with pytest.raises(ConfigError, match="no weights here"):
        AnyUp(2, repository=anyup, entry="broken")
    with pytest.raises(ConfigError, match="Cannot find callable other"):
        AnyUp(2, repository=anyup, entry="other")


def test_naf__says_what_its_clone_needs(tmp_path):
    hub = NAF_HUB.format(needs="no_such_package")
    folder = repository(tmp_path / "NAF", {"hubconf": hub, "src.model.naf": NAF_MODEL})
    with pytest.raises(ConfigError, match="Missing dependencies: no_such_package"):
        Naf(2, repository=folder)


def test_external__two_clones_with_modules_of_one_name(tmp_path, jafar, teacher):
    """JAFAR and NAF each have a package ``src``; neither stays behind."""
    files = {"hubconf": NAF_HUB.format(needs="torch"), "src.model.naf": NAF_MODEL}
    naf = repository(tmp_path / "NAF", files)
    weights = {"jafar": {"key_features_encoder.0.weight": torch.zeros(128, 32, 1, 1)}}
    torch.save(weights, tmp_path / "jafar.pth")
    path = list(sys.path)
    first = Jafar(2, repository=jafar, checkpoint=str(tmp_path / "jafar.pth"))
    second = Naf(2, repository=naf)
    assert sys.path == path
    assert not {"src", "src.upsampler.jafar", "src.model.naf", "utils.img"} & set(sys.modules)
    pixels = torch.rand(1, 3, 16, 32)
    expected = nearest(teacher, pixels, (16, 32), (4, 8))
    for upsampler in (first, second):
        torch.testing.assert_close(upsampler(teacher, pixels, (4, 8)).spatial, expected)


def test_loftup__loads_beside_our_own_package_of_its_name(loftup, teacher, caplog):
    upsampler = LoftUp(2, repository=loftup)
    assert sys.modules["upsamplers"] is upsamplers
    assert "upsamplers.upsamplers" not in sys.modules
    assert "distil" in caplog.text
    features = upsampler(teacher, torch.rand(1, 3, 40, 24), (10, 6))
    assert features.spatial.shape == (1, 32, 10, 6)


def test_loftup__images_do_not_mix(loftup, teacher):
    upsampler, pixels = LoftUp(2, repository=loftup), torch.rand(2, 3, 32, 32)
    pixels[0] *= 0.2
    both = upsampler(teacher, pixels, (4, 4)).spatial
    alone = upsampler(teacher, pixels[:1], (4, 4)).spatial
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-5)


def test_loftup__of_another_encoder_says_so(loftup):
    spec = TeacherSpec("toy", 3, None, 8, (32, 32), None, (0.0,) * 3, (1.0,) * 3)
    other = FrozenTeacher(lambda pixels: (None, F.avg_pool2d(pixels, 8)), spec)
    with pytest.raises(ConfigError, match=r"'loftup'.*\[1, 3, 4, 4\].*32"):
        LoftUp(2, repository=loftup)(other, torch.rand(1, 3, 32, 32), (8, 8))


@pytest.mark.parametrize(("factor", "steps"), [(2, 1), (4, 2), (3, 2)])
def test_uplift__doubles_and_sees_what_the_teacher_is_shown(uplift, teacher, factor, steps):
    upsampler = UpliftPublished(factor, repository=uplift)
    pixels, grid = torch.rand(2, 3, 100, 80), (2 * factor, 3 * factor)
    features = upsampler(teacher, pixels, grid)
    assert (upsampler.network.pretrained, upsampler.network.iters) == (True, steps)
    image, outsize = upsampler.network.seen[1]
    assert image.shape == (1, 3, 16, 24)
    if factor == 3:
        assert (features.spatial.shape[2:], outsize) == (grid, [6, 9])
        return
    assert outsize is None
    expected = nearest(teacher, pixels, (16, 24), grid)
    torch.testing.assert_close(features.spatial, expected)


def test_uplift__a_checkpoint_of_safetensors(uplift, tmp_path):
    path = tmp_path / "uplift.safetensors"
    save_file({"gain": torch.full((1,), 2.0)}, path)
    network = UpliftPublished(1, repository=uplift, checkpoint=str(path)).network
    assert (network.gain, network.pretrained) == (2, False)
    path.write_bytes(b"not safe tensors")
    with pytest.raises(WeightsError, match=r"uplift\.safetensors"):
        UpliftPublished(1, repository=uplift, checkpoint=str(path))


def test_external__a_result_of_another_size_is_refused(tmp_path, teacher):
    files = {
        "hubconf": NAF_HUB.format(needs="torch"),
        "src.model.naf": NAF_MODEL.replace("output_size, mode", "(3, 3), mode"),
    }
    upsampler = Naf(2, repository=repository(tmp_path / "NAF", files))
    with pytest.raises(ConfigError, match=r"\[1, 32, 3, 3\].*\[1, 32, 4, 4\]"):
        upsampler(teacher, torch.rand(1, 3, 16, 16), (4, 4))


def test_checkpoint__damaged_foreign_or_not_tensors(anyup, jafar, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        AnyUp(2, repository=anyup, checkpoint=str(path))
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="AnyUp"):
        AnyUp(2, repository=anyup, checkpoint=str(path))
    with pytest.raises(WeightsError, match="JAFAR"):
        Jafar(2, repository=jafar, checkpoint=str(path))
    with pytest.raises(WeightsError, match="No such file"):
        AnyUp(2, repository=anyup, checkpoint=str(tmp_path / "none.pth"))


def test_checkpoint__code_in_it_runs_only_where_it_is_trusted(anyup, trap, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"gain": torch.full((1,), 3.0)}, "cfg": trap}, path)
    with pytest.raises(WeightsError, match=r"weights\.pth: .*io\.open"):
        AnyUp(2, repository=anyup, checkpoint=str(path))
    assert not trap.ran.exists()
    with trusting_pickles():
        upsampler = AnyUp(2, repository=anyup, checkpoint=str(path))
    assert trap.ran.exists()
    assert upsampler.network.gain.item() == 3


def test_checkpoint_sha256__is_that_of_the_file(anyup, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"gain": torch.full((1,), 3.0)}, path)
    found = sha256(path.read_bytes()).hexdigest()
    AnyUp(2, repository=anyup, checkpoint=str(path), checkpoint_sha256=found)
    with pytest.raises(WeightsError, match=rf"^options.checkpoint_sha256: .*{found}, not 0{{64}};"):
        AnyUp(2, repository=anyup, checkpoint=str(path), checkpoint_sha256="0" * 64)
    with pytest.raises(ConfigError, match="checkpoint_sha256"):
        AnyUp(2, repository=anyup, checkpoint_sha256=found)
