"""Each kind of head equals its formula, written here in plain operations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from radio_distill.config import HeadConfig, HeadsConfig
from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.models import HEADS
from radio_distill.models.heads import Head
from radio_distill.models.projectors import HeadShape, Projector, build_projector
from radio_distill.normalize.phi_s import PhiS
from radio_distill.normalize.statistics import Moments
from radio_distill.types import FEATURES, SUMMARY, TeacherSpec

WIDTH, CHANNELS, DEPTH, GRID = 8, 4, 3, (2, 3)
SHAPE = HeadShape(WIDTH, CHANNELS, hidden=12, depth=DEPTH)


def projector(name, shape=SHAPE, **options):
    """Make a head whose every number is random, in float64."""
    made = build_projector(HeadConfig(name=name, options=options), shape, "head").double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def tokens_of(patches=GRID[0] * GRID[1], prefix=0):
    """Return the tokens behind the last block, and behind each."""
    torch.manual_seed(1)
    return torch.randn(1 + DEPTH, 2, prefix + patches, WIDTH, dtype=torch.float64)


def layer_norm(tokens, state, name, eps):
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(tokens, state, name):
    result = tokens @ state[f"{name}.weight"].T
    return result + state[f"{name}.bias"] if f"{name}.bias" in state else result


def gelu(tokens):
    return tokens * 0.5 * (1 + torch.erf(tokens / 2**0.5))


def mlp(tokens, state, prefix=""):
    hidden = linear(tokens, state, f"{prefix}fc1")
    normed = layer_norm(hidden, state, f"{prefix}final.0", 1e-5)
    return linear(gelu(normed), state, f"{prefix}final.2")


def ln_mlp(tokens, inner, state):
    return mlp(tokens, state)


def identity(tokens, inner, state):
    return tokens


def one_linear(tokens, inner, state):
    return linear(tokens, state, "final.0")


def block(tokens, state, prefix, heads):
    """One pre-norm block with LayerScale."""
    batch, count, width = tokens.shape
    split = linear(layer_norm(tokens, state, f"{prefix}norm1", 1e-6), state, f"{prefix}attn.qkv")
    query, key, value = (
        part.view(batch, count, heads, -1).transpose(1, 2) for part in split.chunk(3, dim=-1)
    )
    weights = (query @ key.mT / (width // heads) ** 0.5).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).reshape(batch, count, width)
    tokens = tokens + linear(mixed, state, f"{prefix}attn.proj") * state[f"{prefix}ls1.gamma"]
    normed = layer_norm(tokens, state, f"{prefix}norm2", 1e-6)
    hidden = gelu(linear(normed, state, f"{prefix}mlp.fc1"))
    return tokens + linear(hidden, state, f"{prefix}mlp.fc2") * state[f"{prefix}ls2.gamma"]


def attention(tokens, inner, state):
    for index in range(2):
        tokens = block(tokens, state, f"blocks.{index}.", heads=4)
    return mlp(tokens, state, "mlp.")


def ladder(tokens, inner, state):
    """As the paper has it: a second layer for each block, the last block's four times as wide."""
    total, start = state["final.0.bias"], 0
    for index, width in enumerate((3, 3, 12)):
        hidden = gelu(linear(inner[index], state, f"rungs.{index}"))
        total = total + hidden @ state["final.0.weight"][:, start : start + width].T
        start += width
    return total


def conv(tokens, inner, state):
    spatial = tokens.mT.unflatten(2, GRID)
    for index in (0, 3, 6):
        mean = spatial.mean((1, 2, 3), keepdim=True)
        deviation = (spatial - mean).square().mean((1, 2, 3), keepdim=True).add(1e-5).sqrt()
        scale, bias = (
            state[f"layers.{index}.{part}"][:, None, None] for part in ("weight", "bias")
        )
        spatial = (spatial - mean) / deviation * scale + bias
        if index < 6:
            weight = state[f"layers.{index + 1}.weight"]
            padded = F.pad(spatial, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [B,C,h,w,3,3]
            spatial = torch.einsum("bchwij,ocij->bohw", padded, weight)
            spatial = (spatial + state[f"layers.{index + 1}.bias"][:, None, None]).relu()
    return linear(spatial.flatten(2).mT, state, "final.0")


FORMULAS = {
    "attention": (attention, {"heads": 4}),
    "ladder": (ladder, {"hidden": 3}),
    "conv": (conv, {"hidden": 5}),
    "mlp": (ln_mlp, {}),
    "ln_mlp": (ln_mlp, {}),
    "linear": (one_linear, {}),
    "identity": (identity, {}),
}


def shape_of(name):
    return HeadShape(WIDTH, WIDTH, 12) if name == "identity" else SHAPE


def test_formulas__every_kind_has_one():
    assert FORMULAS.keys() == set(HEADS.names())


@pytest.mark.parametrize("name", FORMULAS)
def test_projector__equals_the_formula(name):
    formula, options = FORMULAS[name]
    head = projector(name, shape_of(name), **options)
    tokens, *inner = tokens_of()
    expected = formula(tokens, inner, head.state_dict())
    torch.testing.assert_close(head(tokens, GRID, inner), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", FORMULAS)
def test_projector__gradients(name):
    _, options = FORMULAS[name]
    head = projector(name, shape_of(name), **options)
    tokens, *inner = tokens_of()[:, :1].requires_grad_()
    inputs = [tokens, *inner] if head.reads_blocks else [tokens]
    assert torch.autograd.gradcheck(lambda tokens, *inner: head(tokens, GRID, inner), inputs)


def moments():
    torch.manual_seed(2)
    found = Moments(CHANNELS)
    found.update(torch.einsum("cd,bdhw->bchw", torch.randn(4, 4), torch.randn(3, 4, 5, 5)) + 3)
    return found


@pytest.mark.parametrize("name", FORMULAS)
def test_projector__a_folded_normalizer_is_its_inverse(name):
    """And unfolding it again is nothing."""
    _, options = FORMULAS[name]
    head = projector(name, shape_of(name), **options)
    normalizer = PhiS().fit(moments())
    tokens, *inner = tokens_of()
    before = head(tokens, GRID, inner)
    folded = head.exchange_last(normalizer.fold)
    assert folded == (name != "identity"), "the identity has nothing that could be exchanged"
    if not folded:
        return
    inverted = normalizer.invert(before.mT.unflatten(2, GRID)).flatten(2).mT
    torch.testing.assert_close(head(tokens, GRID, inner), inverted, atol=1e-10, rtol=1e-10)
    again = projector(name, shape_of(name), **options)
    again.load_state_dict(head.state_dict())  # also where the kind's last layer has no bias
    again.exchange_last(normalizer.unfold)
    torch.testing.assert_close(again(tokens, GRID, inner), before, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "times"), [("mlp", 3), ("attention", 3), ("conv", 4)])
def test_head__upsampled_cells_lie_in_their_own_cell(student_config, name, times):
    """A finer map, and each of its cells is what its part of the prediction says."""
    options = {"upsample": times, **({"heads": 4} if name == "attention" else {})}
    chosen = HeadsConfig(features=HeadConfig(name=name, options=options))
    teacher = TeacherSpec("a", CHANNELS, None, 16, (64, 64), None, (0.5,) * 3, (0.5,) * 3)
    head = Head(WIDTH, teacher, student_config(heads={"a": chosen})).double()
    spatial = torch.randn(2, WIDTH, *GRID, dtype=torch.float64)
    fine = head(spatial[:, :, 0, 0], spatial).spatial
    assert fine.shape == (2, CHANNELS, times * GRID[0], times * GRID[1])
    cells = head.spatial(spatial.flatten(2).mT, GRID).unflatten(1, GRID)
    cells = cells.unflatten(-1, (times, times, -1))
    for row, column in ((0, 0), (3, 7), (5, 4)):
        expected = cells[:, row // times, column // times, row % times, column % times]
        torch.testing.assert_close(fine[:, :, row, column], expected)
    normalizer = PhiS().fit(moments())
    assert head.fold(normalizer, None) == []
    folded = head(spatial[:, :, 0, 0], spatial).spatial
    torch.testing.assert_close(folded, normalizer.invert(fine), atol=1e-6, rtol=1e-6)
    head.spatial.exchange_last(normalizer.unfold)
    again = head(spatial[:, :, 0, 0], spatial).spatial
    torch.testing.assert_close(again, fine, atol=1e-6, rtol=1e-6)


def test_conv__upsampled_from_16_cells_to_64():
    """Theia's head of SAM: 31 cells a side between, and cells far away have no part in one."""
    head = projector("conv", SHAPE, upsample=4)
    sides = []
    for at in (1, 4):
        head.layers[at].register_forward_hook(lambda *given: sides.append(given[2].shape[-1]))
    head(torch.zeros(1, 256, WIDTH, dtype=torch.float64), (16, 16))
    assert sides == [31, 64]
    for at in (0, 3, 6):
        head.layers[at] = torch.nn.Identity()  # the norms see the whole map
    tokens = torch.randn(1, 256, WIDTH, dtype=torch.float64, requires_grad=True)
    head(tokens, (16, 16))[0, 8 * 16 + 8].sum().backward()
    reached = tokens.grad[0].abs().sum(-1).unflatten(0, (16, 16)).nonzero()
    assert reached.min() == 7
    assert reached.max() == 9


@pytest.mark.parametrize("part", ["summary", "shared"])
def test_head__a_summary_has_no_cells_to_upsample(student_config, part):
    upsampled = HeadConfig(name="mlp", options={"upsample": 2})
    chosen = HeadsConfig(summary=upsampled)
    if part == "shared":
        chosen = HeadsConfig(summary=HeadConfig(name="shared"), features=upsampled)
    teacher = TeacherSpec("a", CHANNELS, CHANNELS, 16, (64, 64), None, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match="heads of teacher 'a'"):
        Head(WIDTH, teacher, student_config(heads={"a": chosen}))


def test_ln_mlp__biases_and_widths():
    names = {name for name, _ in projector("ln_mlp", hidden=5).named_parameters()}
    assert names == {"fc1.weight", "final.0.weight", "final.0.bias", "final.2.weight"}
    siglino = projector("ln_mlp", bias=True, init_std=0.01)
    assert siglino.fc1.bias is not None
    assert siglino.final[2].bias is None
    assert projector("ln_mlp", hidden=5).fc1.weight.shape == (5, WIDTH)


def test_mlp__initial_deviation():
    drawn = build_projector(
        HeadConfig(name="mlp", options={"init_std": 0.02}), HeadShape(256, 256, 256), ""
    )
    for layer in (drawn.fc1, drawn.final[2]):
        assert layer.weight.detach().std().item() == pytest.approx(0.02, rel=0.02)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HeadConfig(name="mpl"), "'mlp'"),
        (HeadConfig(name="mlp", options={"hiden": 3}), "'hidden'"),
        (HeadConfig(name="mlp", options={"hidden": -3}), "-3"),
        (HeadConfig(name="mlp", options={"bias": "no"}), "true or false"),
        (HeadConfig(name="identity"), "8.*4"),
        (HeadConfig(name="identity", options={"a": 1}), "no options"),
        (HeadConfig(name="attention", options={"heads": 3}), "3 .*8"),
        (HeadConfig(name="ladder", options={"blocks": [0, 3]}), "0 to 2"),
        (HeadConfig(name="ladder", options={"blocks": [1, 1]}), "each once"),
    ],
)
def test_build_projector__mistakes_are_one_line(config, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message) as caught:
        build_projector(config, SHAPE, "heads of teacher 'clip': features")
    assert "\n" not in str(caught.value)


class Unfinished(Projector):
    def __init__(self, shape):
        super().__init__()


def test_build_projector__a_kind_that_predicts_nothing_is_one_line(monkeypatch):
    monkeypatch.setitem(HEADS._entries, "unfinished", f"{__name__}:Unfinished")
    with pytest.raises(ConfigError, match="unfinished lacks forward"):
        build_projector(HeadConfig(name="unfinished"), SHAPE, "head")


def test_attention__published_names():
    names = {name for name, _ in projector("attention", heads=4).named_parameters()}
    mlp_names = {f"mlp.{name}" for name, _ in projector("mlp").named_parameters()}
    assert {name for name in names if not name.startswith("blocks.")} == mlp_names
    assert {name.split(".")[1] for name in names - mlp_names} == {"0", "1"}


def test_ladder__of_some_blocks():
    tokens, *inner = tokens_of()
    head = projector("ladder", hidden=3, blocks=[1])
    state = head.state_dict()
    expected = linear(gelu(linear(inner[1], state, "rungs.0")), state, "final.0")
    torch.testing.assert_close(head(tokens, GRID, inner), expected)


def spec(summary_channels, name="clip"):
    half = (0.5, 0.5, 0.5)
    return TeacherSpec(name, CHANNELS, summary_channels, 14, (224, 224), None, half, half)


def test_head__of_one_teacher_and_of_all(student_config):
    config = student_config(
        summary_head=HeadConfig(name="linear"),
        feature_head=HeadConfig(name="ln_mlp", options={"hidden": 5}),
        heads={"sam": HeadsConfig(features=HeadConfig(name="mlp"))},
    )
    clip, sam = (Head(WIDTH, spec(3, name), config) for name in ("clip", "sam"))
    kinds = [
        {part: type(one).__name__ for part, one in head.projectors.items()} for head in (clip, sam)
    ]
    assert kinds == [
        {SUMMARY: "LinearHead", FEATURES: "LNMLPHead"},
        {SUMMARY: "LinearHead", FEATURES: "MLPHead"},
    ]


@pytest.mark.parametrize("name", ["attention", "conv"])
def test_head__of_a_summary_that_is_none(student_config, name):
    with pytest.raises(ConfigError, match=r"'clip'.*summary"):
        Head(WIDTH, spec(3), student_config(summary_head=HeadConfig(name=name)))


def test_head__shared_attention_sees_the_summary_token_first(student_config):
    """DUNE's head: one block over summary and patches, then one linear layer for both."""
    options = {"blocks": 1, "heads": 2, "output": "linear"}
    config = student_config(
        summary_head=HeadConfig(name="shared"),
        feature_head=HeadConfig(name="attention", options=options),
    )
    head = Head(WIDTH, spec(CHANNELS), config).double()
    tokens = tokens_of(prefix=1)[0]
    spatial = tokens[:, 1:].mT.unflatten(2, GRID)
    features, state = head(tokens[:, 0], spatial), head.spatial.state_dict()
    expected = linear(block(tokens, state, "blocks.0.", heads=2), state, "mlp.final.0")
    torch.testing.assert_close(features.summary, expected[:, 0])
    torch.testing.assert_close(features.spatial.flatten(2).mT, expected[:, 1:])


def test_head__a_prefix_changes_the_features_alone(student_config):
    options = {"blocks": 1, "heads": 2, "prefix": True, "layer_scale": 1.0}
    config = student_config(feature_head=HeadConfig(name="attention", options=options))
    head = Head(WIDTH, spec(3), config)
    token, spatial = torch.randn(2, WIDTH), torch.randn(2, WIDTH, *GRID)
    before, after = head(token, spatial), head(-token, spatial)
    assert before.spatial.shape == after.spatial.shape == (2, CHANNELS, *GRID)
    assert not torch.allclose(before.spatial, after.spatial)


def test_head__shared(student_config):
    """One head, which takes summary token and patches alike; both widths must be equal."""
    config = student_config(summary_head=HeadConfig(name="shared"))
    head = Head(WIDTH, spec(CHANNELS), config)
    token, spatial = torch.randn(2, WIDTH), torch.randn(2, WIDTH, *GRID)
    features = head(token, spatial)
    assert list(head.projectors) == [FEATURES]
    torch.testing.assert_close(features.summary, head.spatial(token))
    torch.testing.assert_close(features.spatial[:, :, 1, 2], head.spatial(spatial[:, :, 1, 2]))
    torch.testing.assert_close(head.summarize(token, spatial), features.summary)
    assert Head(WIDTH, spec(None), config)(token, spatial).summary is None
    for_maps = replace(config, feature_head=HeadConfig(name="conv"))
    with pytest.raises(ConfigError, match="conv"):
        Head(WIDTH, spec(CHANNELS), for_maps)
    with pytest.raises(ConfigError, match=r"'clip'.*4.*3"):
        Head(WIDTH, spec(3), config)
