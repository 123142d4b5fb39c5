"""Numbers that are not finite stop a run; losses that jump and rates that fall are warned of."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from radio_distill.config import WatchConfig
from radio_distill.errors import DivergedError
from radio_distill.train.health import (
    QUIET_STEPS,
    LossMonitor,
    NonFinite,
    NonFiniteGuard,
    SkipCounter,
    check_targets,
    describe,
)
from radio_distill.types import Features

CPU = torch.device("cpu")
NAN = float("nan")


def targets_of(*bad: int) -> dict[str, Features]:
    spatial = torch.zeros(3, 4, 2, 2)
    for image in bad:
        spatial[image, 2, 0, 1] = NAN
    return {"dino": Features(None, spatial), "clip": Features(torch.zeros(3, 5), spatial * 0)}


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_check_targets__names_teacher_and_images(bad):
    spatial, summary = torch.zeros(3, 4, 2, 2), torch.zeros(3, 5)
    check_targets({"dino": Features(summary, spatial)}, ("a", "b", "c"))
    spatial[1, 2, 0, 1] = bad
    with pytest.raises(DivergedError, match=r"'dino' .* b;"):
        check_targets({"dino": Features(None, spatial)}, ("a", "b", "c"))
    summary[2, 0] = bad
    with pytest.raises(DivergedError, match="c;"):
        check_targets({"dino": Features(summary, torch.zeros(3, 4, 2, 2))}, ("a", "b", "c"))


def test_guard__nothing_where_all_is_finite():
    guard = NonFiniteGuard()
    assert float(guard.flag(CPU)) == 0
    guard.add_targets({"dino": Features(None, torch.zeros(3, 4, 2, 2))}, ("a", "b", "c"))
    guard.add_loss(torch.ones(3), {"dino/features": torch.tensor(1.0)}, ("a", "b", "c"))
    assert float(guard.flag(CPU)) == 0
    assert guard.causes() == []


def test_guard__a_teacher_is_blamed_and_not_the_loss_that_follows():
    guard = NonFiniteGuard()
    targets = targets_of(1)
    targets["clip"] = Features(torch.zeros(3, 5), torch.zeros(3, 4, 2, 2))
    guard.add_targets(targets, ("a", "b", "c"))
    terms = {"dino/features": torch.tensor(NAN), "clip/summary": torch.tensor(1.0)}
    guard.add_loss(torch.tensor([1.0, NAN, 1.0]), terms, ("a", "b", "c"))
    assert float(guard.flag(CPU)) == 1
    assert guard.causes() == [NonFinite("teacher dino", ("b",))]


def test_guard__a_loss_names_its_terms():
    guard = NonFiniteGuard()
    terms = {"dino/features": torch.tensor(NAN), "clip/summary": torch.tensor(1.0)}
    guard.add_loss(torch.tensor([NAN, 1.0]), terms, ("a", "b"))
    assert guard.causes() == [NonFinite("loss dino/features", ("a",))]


def test_guard__a_gradient_may_come_from_any_image():
    guard = NonFiniteGuard()
    guard.add_targets(targets_of(), ("a", "b", "c"))
    guard.add_targets(targets_of(), ("a", "b", "c"))  # another partition, the same images
    assert guard.gradient() == [NonFinite("gradient", ("a", "b", "c"))]


def test_skips__one_too_many_in_a_row_ends_the_run():
    found = [NonFinite("teacher dino", ("a", "b", "c", "d"))]
    skips = SkipCounter(2)
    skips.add(1, found, None)
    skips.add(2, found, None)
    skips.reset()
    skips.add(4, found, None)
    skips.add(5, found, None)
    assert (skips.total, skips.in_a_row) == (4, 2)
    with pytest.raises(DivergedError) as caught:
        skips.add(6, found, Path("runs/x/step-00000003"))
    message = str(caught.value)
    assert "teacher dino for a, b, c and 1 more" in message
    assert "runs/x/step-00000003" in message
    assert "teachers.dino.dtype" in message
    assert "\n" not in message


def test_skips__none_may_be():
    with pytest.raises(DivergedError, match=r"step 7 .*gradient for a"):
        SkipCounter(0).add(7, [NonFinite("gradient", ("a",))], None)


def test_skips__go_on_counting_after_a_resume():
    with pytest.raises(DivergedError, match="3rd"):
        SkipCounter(2, total=5, in_a_row=2).add(9, [NonFinite("gradient", ("a",))], None)


def test_describe__joins_what_processes_found():
    found = [
        NonFinite("teacher a", ("x",)),
        NonFinite("loss", ("y",)),
        NonFinite("teacher a", ("z",)),
    ]
    assert describe(found) == "teacher a for x, z; loss for y"


STEPS = 2000


def warned(losses: np.ndarray, **settings: float) -> list[int]:
    """Return the steps, from 0, that are warned of."""
    monitor = LossMonitor(WatchConfig(**settings))
    return [step for step, value in enumerate(losses) if monitor.loss(step, float(value))]


def decay(seed: int, noise: float = 0.05) -> np.ndarray:
    """A loss that falls from 8 to 1, fast at first, with noise in proportion to it."""
    steps = np.arange(STEPS)
    level = 1 + 6 * np.exp(-steps / 60) + np.exp(-steps / 700)
    return level * np.exp(noise * np.random.default_rng(seed).standard_normal(STEPS))


def plateau(seed: int) -> np.ndarray:
    """A constant with noise whose neighbours resemble each other, as with a slow optimizer."""
    noise = np.random.default_rng(seed).standard_normal(STEPS)
    for step in range(1, STEPS):
        noise[step] = 0.9 * noise[step - 1] + math.sqrt(1 - 0.9**2) * noise[step]
    return 0.7 + 0.02 * noise


def heavy_tails(seed: int) -> np.ndarray:
    """Small batches: a skewed loss, often double, rarely three times the mean."""
    return np.random.default_rng(seed).gamma(4.0, 0.25, STEPS)


def sizes(seed: int) -> np.ndarray:
    """A step draws one of six image sizes, one of which has twice the loss."""
    generator = np.random.default_rng(seed)
    is_large = generator.random(STEPS) < 1 / 6
    return np.where(is_large, 2.0, 1.0) + 0.01 * generator.standard_normal(STEPS)


def thawing(seed: int) -> np.ndarray:
    """The body is frozen for 500 steps: a plateau, then a second fall."""
    losses = decay(seed)
    return np.concatenate((losses[:500], losses[500:] * 0.5))


def warm_up(seed: int) -> np.ndarray:
    """A fall, then a slow rise by a third as the learning rate rises."""
    return decay(seed) * (1 + np.clip(np.arange(STEPS) - 300, 0, 400) / 1200)


CURVES = [decay, plateau, heavy_tails, sizes, thawing, warm_up]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seed", range(5))
def test_loss__ordinary_curves_give_no_warning(curve, seed):
    assert warned(curve(seed)) == []


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seed", range(5))
def test_loss__each_spike_gives_one_warning(curve, seed):
    losses = curve(seed)
    at = [400, 460, 700, 1200, 1900]
    for step in at:  # a spike of several steps
        losses[step : step + 4] = losses[step - 50 : step + 50].mean() * np.array([10, 8, 5, 2])
    assert warned(losses) == at


@pytest.mark.parametrize("height", [10, 1000])
def test_loss__new_level_gives_one_warning(height):
    losses = plateau(0)
    losses[1000:] *= height
    assert warned(losses) == [1000]


def test_loss__spike_on_a_new_level_gives_a_second_warning():
    losses = plateau(0)
    losses[1000:] *= 10
    losses[1300] *= 10
    assert warned(losses) == [1000, 1300]


def test_loss__bound_is_in_deviations():
    # +1 and -1 by turns: mean 0 and deviation 1 over any even number of steps.
    turns = [1.0, -1.0] * 50
    assert warned(np.array([*turns, 2.99]), loss_spike=3.0) == []
    assert warned(np.array([*turns, 3.01]), loss_spike=3.0) == [100]


def test_loss__constant_loss_may_move_a_little():
    flat = np.full(200, 5.0)
    flat[150] = 5.03  # 0.6 %, where eight times 0.1 % are allowed
    assert warned(flat) == []
    flat[150] = 5.05
    assert warned(flat) == [150]


def test_loss__first_steps_and_quiet_steps():
    losses = plateau(0)
    losses[[20, 300, 300 + QUIET_STEPS - 1, 400]] = 100
    assert warned(losses) == [300, 400]


def test_loss__not_finite_is_left_to_the_guard():
    losses = plateau(0)
    losses[[0, 300, 301]] = math.nan, math.inf, -math.inf
    losses[302] = 100
    assert warned(losses) == [302]


def test_loss__never_with_0():
    losses = plateau(0)
    losses[300] = 1e9
    assert warned(losses, loss_spike=0) == []


def test_loss__says_what_how_much_and_where_to_look():
    monitor = LossMonitor(WatchConfig())
    for step in range(100):
        assert monitor.loss(step, 1.0 + 0.1 * (-1) ** step) is None
    assert monitor.loss(100, 4.0) == (
        "step 100: the loss of 4 lies 30 usual deviations above its mean of 1 (watch.loss_spike is "
        "8); look at the losses by teacher and at gradient_norm, and if it does not come back, "
        "lower the learning rate"
    )


def rates(values: list[float], **settings: float) -> list[int]:
    """Return the log windows, from 0, that are warned of."""
    monitor = LossMonitor(WatchConfig(**settings))
    return [at for at, value in enumerate(values) if monitor.rate(at, value)]


def test_rate__first_windows_do_not_count():
    # Compilation: were they part of the median, 100 would never look slow.
    assert rates([1, 1, 400, 400, 400, 400, 100]) == [6]
    assert rates([900, 900, 400, 400, 400, 400]) == []
    assert rates([400, 400, 400, 400, 100]) == []  # not yet known what is usual


def test_rate__warns_once_until_it_recovers():
    usual = [400.0] * 8
    # 250 is no recovery: that is at 300, half-way between bound and median.
    assert rates([*usual, 150, 100, 190, 250, 150, *usual, 150]) == [8, 21]


def test_rate__noise_gives_no_warning():
    noise = np.exp(0.15 * np.random.default_rng(0).standard_normal(500))
    assert rates((300 * noise).tolist()) == []


def test_rate__settings():
    usual = [400.0] * 8
    assert rates([*usual, 350], slow_share=0.9) == [8]
    assert rates([*usual, 1], slow_share=0) == []


@pytest.mark.parametrize(
    ("waited", "cause"),
    [
        (0.7, "70% of the time was spent waiting for images: look at the disk of data.shards"),
        (0.05, "5% of the time was spent waiting for images, so look at the devices"),
    ],
)
def test_rate__says_what_how_much_and_where_to_look(waited, cause):
    monitor = LossMonitor(WatchConfig())
    for step in range(8):
        assert monitor.rate(step, 400.0, 0.0) is None
    line = monitor.rate(500, 100.0, waited)
    assert line is not None
    assert line.startswith(
        "step 500: 100 images/s, 25% of the 400 that are usual (watch.slow_share is 0.5); " + cause
    )
