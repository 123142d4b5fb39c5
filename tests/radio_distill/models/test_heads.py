"""Every parameter takes part in every pass; what is not asked or frozen gets exact zeros."""

import itertools

import pytest
import torch

from radio_distill.config import HeadConfig, HeadsConfig
from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.models.heads import (
    Head,
    build_student,
)
from radio_distill.models.position import NUM_DRAWS
from radio_distill.models.projectors import HeadShape, MLPHead
from radio_distill.train.optim import parameter_groups
from radio_distill.types import TeacherSpec


def teacher(summary_channels):
    half = (0.5, 0.5, 0.5)
    return TeacherSpec("a", 4, summary_channels, 14, (224, 224), None, half, half)


@pytest.mark.parametrize("num_layers", [0, 2])
@torch.no_grad()
def test_mlp_head__equals_the_formula(num_layers):
    head = MLPHead(HeadShape(5, 3, hidden=8, layers=num_layers))
    for parameter in head.parameters():
        parameter.normal_()
    state = head.state_dict()

    def norm_gelu_linear(x, name):
        normed = (x - x.mean(1, keepdim=True)) / (
            x.var(1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        normed = normed * state[f"{name}.0.weight"] + state[f"{name}.0.bias"]
        active = normed * 0.5 * (1 + torch.erf(normed / 2**0.5))
        return active @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]

    tokens = torch.randn(7, 5)
    hidden = tokens @ state["fc1.weight"].T + state["fc1.bias"]
    for index in range(num_layers):
        hidden = hidden + norm_gelu_linear(hidden, f"blocks.{index}")
    expected = norm_gelu_linear(hidden, "final")
    torch.testing.assert_close(head(tokens), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_head__each_cell_is_the_head_of_its_own_token(student_config):
    head = Head(6, teacher(3), student_config(head_layers=1))
    token, spatial = torch.randn(2, 6), torch.randn(2, 6, 3, 5)
    features = head(token, spatial)
    assert features.summary is not None
    assert features.summary.shape == (2, 3)
    assert features.spatial.shape == (2, 4, 3, 5)
    for row, column in ((0, 0), (1, 4), (2, 3)):
        expected = head.spatial(spatial[:, :, row, column])
        torch.testing.assert_close(features.spatial[:, :, row, column], expected)


def test_head__without_summary_has_no_parameters_for_it(student_config):
    head = Head(6, teacher(None), student_config())
    assert head(torch.randn(2, 6), torch.randn(2, 6, 3, 5)).summary is None
    assert all(name.startswith("spatial.") for name, _ in head.named_parameters())


@pytest.fixture
def model(student_config, teachers):
    config = student_config(head_layers=1, window_size=2, global_blocks=2)
    model = build_student(config, teachers)
    model.student.global_blocks = frozenset({1})
    del model.student.blocks[2:]
    return model


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 64)


def changed(model):
    """Return the parts with a gradient that is not zero; no gradient may be None."""
    parts = set()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        if parameter.grad.any():
            is_head = name.startswith(("adaptors", "inner"))
            parts.add(".".join(name.split(".")[:3]) if is_head else "body")
    return parts


def changed_by(loss, model):
    loss.backward()
    return {part.split(".")[0] for part in changed(model)}


def test_forward__shapes(model, pixels):
    predictions = model(pixels, ("sam", "clip")).features
    assert list(predictions) == ["sam", "clip"]
    assert predictions["clip"].summary.shape == (2, 5)
    assert predictions["clip"].spatial.shape == (2, 6, 2, 4)
    assert predictions["sam"].summary is None
    assert predictions["sam"].spatial.shape == (2, 4, 2, 4)


@pytest.mark.parametrize(
    ("asked", "part", "expected"),
    [
        (
            ("clip", "sam"),
            "both",
            {"body", "adaptors.clip.summary", "adaptors.clip.spatial", "adaptors.sam.spatial"},
        ),
        (("clip",), "both", {"body", "adaptors.clip.summary", "adaptors.clip.spatial"}),
        (("clip",), "summary", {"body", "adaptors.clip.summary"}),
        (("clip",), "spatial", {"body", "adaptors.clip.spatial"}),
        (("sam",), "spatial", {"body", "adaptors.sam.spatial"}),
    ],
)
@pytest.mark.parametrize("freeze_body", [False, True])
def test_forward__who_learns(model, pixels, asked, part, expected, freeze_body):
    predictions = model(pixels, asked, torch.rand(2, NUM_DRAWS), freeze_body).features
    loss = torch.zeros(())
    for features in predictions.values():
        if part in ("summary", "both") and features.summary is not None:
            loss = loss + features.summary.square().sum()
        if part in ("spatial", "both"):
            loss = loss + features.spatial.square().sum()
    loss.backward()
    assert changed(model) == (expected - {"body"} if freeze_body else expected)


def gradients(model, pixels, asked, freeze_body=False):
    features = model(pixels, asked, freeze_body=freeze_body).features["clip"]
    (features.summary.square().sum() + features.spatial.square().sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_forward__other_heads_do_not_touch_values_or_gradients(model, pixels):
    """Bit for bit, as if there were no other head: also where that head is full of infinities."""
    expected = model.heads["clip"](*_tokens(model, pixels))
    alone, asked = gradients(model, pixels, ("clip",)), gradients(model, pixels, ("clip", "sam"))
    for name in alone:
        assert torch.equal(alone[name], asked[name]), name
    torch.nn.init.constant_(model.heads["sam"].spatial.fc1.bias, float("inf"))
    features = model(pixels, ("clip",)).features["clip"]
    assert torch.equal(features.spatial, expected.spatial)
    assert torch.equal(features.summary, expected.summary)
    for name, value in gradients(model, pixels, ("clip",)).items():
        assert torch.equal(value, alone[name]) or name.startswith("adaptors.sam"), name


def test_forward__gradients_arrive_in_one_order(model):
    """A distributed engine reduces them as they come, while other processes run other passes."""
    arrived, orders = [], set()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    for freeze_body, asked, window, side in itertools.product(
        (False, True), (("clip",), ("sam",), ("clip", "sam")), (None, 2), (32, 64)
    ):
        found = model(torch.rand(2, 3, side, side), asked, None, freeze_body, window)
        sum(features.spatial.square().mean() for features in found.features.values()).backward()
        orders.add(tuple(arrived))
        arrived.clear()
    (order,) = orders
    assert sorted(order) == sorted(name for name, _ in model.named_parameters())


def _tokens(model, pixels):
    summary, spatial = model.student(pixels)
    return summary[:, 0], spatial


def test_forward__frozen_body_teaches_the_heads_the_same(model, pixels):
    free = gradients(model, pixels, ("clip",))
    frozen = gradients(model, pixels, ("clip",), freeze_body=True)
    for name, value in frozen.items():
        expected = free[name] if name.startswith("adaptors") else torch.zeros_like(value)
        assert torch.equal(value, expected), name


def test_forward__each_teacher_has_its_own_summary_token(model, pixels):
    with torch.no_grad():
        summary, spatial = model.student(pixels)
        second = model.heads["clip"](summary[:, 1], spatial)
        assert not torch.allclose(model(pixels, ("clip",)).features["clip"].summary, second.summary)


def test_forward__micro_batches_add_up_to_the_batch(model):
    pixels, draws = torch.rand(4, 3, 32, 32), torch.rand(4, NUM_DRAWS)

    def accumulate(parts):
        for part in parts:
            predictions = model(pixels[part], ("clip", "sam"), draws=draws[part]).features
            sum(f.spatial.square().sum() for f in predictions.values()).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    whole = accumulate([slice(0, 4)])
    parts = accumulate([slice(0, 1), slice(1, 4)])
    for name, value in whole.items():
        torch.testing.assert_close(
            parts[name], value, atol=1e-4 * float(value.abs().max()), rtol=1e-4
        )


def test_forward__bfloat16_autocast(model, pixels):
    with torch.autocast("cpu", torch.bfloat16):
        features = model(pixels, ("clip",)).features["clip"]
        features.spatial.float().square().mean().backward()
    expected = model(pixels, ("clip",)).features["clip"].spatial
    torch.testing.assert_close(features.spatial.float(), expected, atol=0.05, rtol=0.05)
    assert "body" in changed(model)


@pytest.mark.parametrize("freeze_body", [False, True])
def test_forward__an_inner_head_sees_the_student_that_ends_at_its_block(
    student_config, teachers, pixels, freeze_body
):
    inner = HeadsConfig(features=HeadConfig(name="conv"), inner={"0": 0.5, "1": 2.0})
    model = build_student(student_config(heads={"clip": inner}), teachers)
    predictions = model(pixels, ("clip",), freeze_body=freeze_body)
    loss = sum(spatial.square().sum() for spatial in predictions.inner["clip"])
    assert changed_by(loss, model) == ({"inner"} if freeze_body else {"body", "inner"})
    with torch.no_grad():
        del model.student.blocks[1:]
        token, spatial = model.student(pixels)
        expected = model.inner_heads("clip")[0](token[:, 0], spatial).spatial
    torch.testing.assert_close(predictions.inner["clip"][0], expected)
    groups = {name for group in parameter_groups(model, 0.1) for name in group["params"]}
    assert set(model.inner.parameters()) <= groups


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (HeadsConfig(inner={"99": 1.0}), "99 is no block .* 0 to"),
        (HeadsConfig(features=HeadConfig(name="ladder"), inner={"0": 1.0}), "itself"),
    ],
)
def test_build_student__error_for_inner_heads(student_config, teachers, heads, message):
    with pytest.raises(ConfigError, match=f"clip.*inner.*{message}"):
        build_student(student_config(heads={"clip": heads}), teachers)


def test_forward__unknown_teacher(model, pixels):
    with pytest.raises(UnknownNameError, match=r"'clipp'.*'clip'"):
        model(pixels, ("clipp",))


def test_build_student__name_that_a_module_cannot_have(student_config, teachers):
    with pytest.raises(ConfigError, match="a teacher cannot have this name"):
        build_student(student_config(), {"type": teachers["clip"]})


def test_state_dict__round_trip(model, pixels, student_config, teachers):
    other = build_student(student_config(head_layers=1, window_size=2), teachers)
    other.student.global_blocks = frozenset({1})
    del other.student.blocks[2:]
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, found = (m.eval()(pixels, ("clip",)).features for m in (model, other))
    assert torch.equal(expected["clip"].spatial, found["clip"].spatial)


def test_state_dict__names_are_those_of_earlier_files(teachers, student_config):
    """In checkpoints, exports, and the sums of a student's weights as a teacher."""
    model = build_student(student_config(), teachers, learned_weights=True)
    names = set(model.state_dict())
    layers = ("fc1.weight", "fc1.bias", "final.0.weight", "final.0.bias", "final.2.weight")
    assert {name for name in names if name.startswith("adaptors.sam")} == {
        f"adaptors.sam.spatial.{layer}" for layer in (*layers, "final.2.bias")
    }
    own = {name for name in names if not name.startswith(("adaptors.", "student.blocks."))}
    parts = ("mean", "std", "patch_embedding.weight", "positions.table", "prefix_tokens")
    assert own == {*(f"student.{part}" for part in parts), "uncertainty.log_variances"}


def test_parameter_groups__each_parameter_once(model):
    groups = parameter_groups(model, weight_decay=0.02)
    assert [group["name"] for group in groups] == ["body_decay", "body", "head_decay", "head"]
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    torch.optim.AdamW(groups, lr=1e-3)  # also refuses parameters that appear twice


def test_parameter_groups__what_decays(model):
    groups = {group["name"]: group for group in parameter_groups(model, weight_decay=0.02)}
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "body_decay": 0.02,
        "body": 0.0,
        "head_decay": 0.02,
        "head": 0.0,
    }
    for name, parameter in model.named_parameters():
        part = "head" if name.startswith("adaptors") else "body"
        spared = name.endswith(("bias", ".0.weight", "tokens", "table")) or "norm" in name
        assert id(parameter) in members[part if spared else f"{part}_decay"], name
