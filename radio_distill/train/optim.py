"""The optimizer of a stage, its state as named tensors, and its learning rates.

Rates are arrays indexed by step, so that what a step uses can be printed, plotted and tested. A
stage restarts its schedule. While the body is frozen its rate is zero, so that neither the gradient
(which is zero then) nor weight decay moves it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import StageConfig
from ..models.heads import DistilledStudent
from ..models.spectral import ReparametrizedLinear


def build_optimizer(
    name: str, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Make an optimizer over parameter groups with names; each step sets their learning rates.

    ``adamw``, ``nadam``, or ``lamb`` (arXiv 1904.00962, timm's implementation).
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)  # one kernel, on a CPU too
    if name == "nadam":
        return torch.optim.NAdam(groups, betas=betas)
    from timm.optim import Lamb

    # The engine clips the gradient itself, the same way for every optimizer.
    return Lamb(groups, betas=betas, max_grad_norm=None)


def parameter_groups(model: DistilledStudent, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters into ``body_decay``, ``body``, ``head_decay`` and ``head``.

    Vectors (biases, norms, scales), tokens, the position table and learned weights of the loss do
    not decay. Of a spectrally reparametrised matrix its scale decays and the matrix, whose size has
    no effect, does not.
    """
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("body_decay", "body", "head_decay", "head")
    }
    spectral = [
        module
        for module in model.student.modules()
        if isinstance(module, ReparametrizedLinear) and module.spectral
    ]
    scales = {module.spectral_scale for module in spectral}
    matrices = [module.weight for module in spectral]
    kept = {*model.student.undecayed, *matrices}
    parts = (("body", model.student), ("head", model.adaptors), ("head", model.inner))
    for part, module in parts:
        for parameter in module.parameters():
            decays = parameter in scales or (parameter.ndim > 1 and parameter not in kept)
            groups[f"{part}_decay" if decays else part].append(parameter)
    if model.uncertainty is not None:
        groups["head"] += model.uncertainty.parameters()
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": weight_decay if name.endswith("_decay") else 0.0,
        }
        for name, parameters in groups.items()
    ]


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Set each group's rate; a group's name begins with its part (``body_decay``)."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"].partition("_")[0]]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the state as ``{"<moment>/<parameter>": tensor}`` and ``"step"``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key != "step":
                tensors[f"{key}/{names[parameter]}"] = value
    tensors["step"] = torch.tensor(_steps_done(optimizer))
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what :func:`optimizer_tensors` returned."""
    step = int(tensors["step"])
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        if name:
            optimizer.state[parameters[name]][moment] = value.to(parameters[name].device).clone()
    if isinstance(optimizer, (torch.optim.AdamW, torch.optim.NAdam)):
        for parameter, state in optimizer.state.items():
            state["step"] = step_of(optimizer, parameter, step)
    elif step:
        for group in optimizer.param_groups:
            group["step"] = torch.tensor(float(step))


def step_of(optimizer: torch.optim.Optimizer, parameter: Tensor, step: int) -> Tensor:
    """Return a number of steps as the state of a parameter has it: a fused update's by its side."""
    is_fused = optimizer.defaults.get("fused")
    return torch.tensor(float(step), device=parameter.device if is_fused else "cpu")


def _steps_done(optimizer: torch.optim.Optimizer) -> int:
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return int(optimizer.param_groups[0].get("step", 0))


BODY, HEADS = "body", "head"


def cosine(steps: int, peak: float, final: float, warmup_steps: int = 0) -> np.ndarray:
    """Return ``[steps]`` rates: linear warm-up from ``peak / warmup_steps``, then half a cosine."""
    rates = np.full(steps, peak, dtype=np.float64)
    warmup_steps = min(warmup_steps, steps)
    if warmup_steps:
        rates[:warmup_steps] = peak * np.arange(1, warmup_steps + 1) / warmup_steps
    remaining = steps - warmup_steps
    if remaining:
        progress = np.arange(remaining) / max(remaining - 1, 1)
        rates[warmup_steps:] = final + (peak - final) * 0.5 * (1 + np.cos(np.pi * progress))
    return rates


def learning_rates(stage: StageConfig) -> dict[str, np.ndarray]:
    """Return ``{"body": [steps], "head": [steps]}`` for one stage."""
    heads = cosine(stage.steps, stage.learning_rate, stage.final_learning_rate, stage.warmup_steps)
    body = heads.copy()
    body[: stage.frozen_steps] = 0.0
    return {BODY: body, HEADS: heads}


def every(step: int, interval: int, total: int) -> bool:
    """Return whether something periodic is due after ``step`` (from 1); the last step always is."""
    return step == total or (interval > 0 and step % interval == 0)
