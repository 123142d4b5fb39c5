"""Forward, backward and update of the student, on one process or on many.

Both engines keep float32 weights and compute in the recipe's precision through autocast, and both
*sum* gradients over processes, so that the loop weighs images and never asks who runs them.
Teachers stay outside: they are not trained, and a checkpoint must not carry them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EngineConfig, StageConfig
from ..errors import ConfigError
from ..models.heads import DistilledStudent, Predictions, parameter_groups
from ..system.distributed import World
from ..system.precision import autocast
from .optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rates


def build_engine(
    model: DistilledStudent,
    config: EngineConfig,
    stage: StageConfig,
    world: World,
    device: torch.device,
) -> "SingleProcessEngine | DeepSpeedEngine":
    """Choose and make the engine that the recipe asks for.

    Args:
        model: the student with its heads.
        config: the recipe's engine section.
        stage: gives the optimizer.
        world: this process's place.
        device: where it runs.

    Raises:
        ConfigError: where the engine cannot do what is asked.
    """
    if engine_name(config, stage, world.world_size) == "single":
        return SingleProcessEngine(model, config, stage, device)
    return DeepSpeedEngine(model, config, stage, world, device)


def engine_name(config: EngineConfig, stage: StageConfig, world_size: int) -> str:
    """Return which engine a stage runs on, ``single`` or ``deepspeed``.

    Raises:
        ConfigError: where that engine cannot do what the recipe asks.
    """
    name = config.name
    if name == "auto":
        name = "deepspeed" if world_size > 1 else "single"
    if name == "single":
        if world_size > 1:
            raise ConfigError(
                f"engine.name: single runs one process, but {world_size} were started; "
                "set it to auto"
            )
        return name
    if stage.optimizer == "lamb" and config.zero_stage in (1, 2, 3):
        raise ConfigError(
            "engine.zero_stage: lamb needs the norm of whole parameters, which ZeRO flattens and "
            "cuts up; set engine.zero_stage to 0, or the stage's optimizer to adamw"
        )
    if stage.ema_decay and config.zero_stage == 3:
        raise ConfigError(
            "engine.zero_stage: 3 cuts up the weights that ema_decay averages; "
            "set engine.zero_stage to 2, or ema_decay to 0"
        )
    return name


class _Forward:
    """What both engines share: precision and the call of the model."""

    device: torch.device
    model: DistilledStudent
    _callable: Any
    _precision: str

    def forward(
        self,
        pixels: Tensor,
        teachers: tuple[str, ...],
        draws: Tensor | None = None,
        freeze_body: bool = False,
        window_size: int | None = None,
    ) -> Predictions:
        """Predict the features of each named teacher, in that teacher's normalised space.

        Args:
            pixels: ``[B, 3, H, W]`` in [0, 1].
            teachers: whose heads are asked.
            draws: ``[B, K]`` uniform numbers for the position augmentation.
            freeze_body: give the body a gradient of exactly zero.
            window_size: side of the student's attention windows, in tokens; 0 for global
                attention, None for what the recipe says of the student.
        """
        with self.autocast():
            predictions: Predictions = self._callable(
                pixels, teachers, draws=draws, freeze_body=freeze_body, window_size=window_size
            )
        return predictions

    def autocast(self) -> torch.autocast:
        """Return the context in which a student computes in the recipe's precision."""
        return autocast(self._precision, self.device)


class SingleProcessEngine(_Forward):
    """Plain PyTorch on one device."""

    def __init__(
        self,
        model: DistilledStudent,
        config: EngineConfig,
        stage: StageConfig,
        device: torch.device,
    ):
        self.device = device
        self.model = model.to(device)
        self._callable: Any = torch.compile(model) if config.compile else model
        self._precision = config.precision
        self._clip = stage.gradient_clip
        self._optimizer = build_optimizer(parameter_groups(model, stage.weight_decay), stage)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss`` to the step's; ``last`` closes the step."""
        del last
        loss.backward()

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Clip, update at these rates, clear; returns the norm of the gradient before clipping.

        Nothing is updated where the norm is not finite.
        """
        set_learning_rates(self._optimizer, learning_rates)
        norm = _clip_gradient(self.model, self._clip)
        if torch.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def model_tensors(self) -> dict[str, Tensor]:
        """Whole float32 weights and buffers, by name."""
        return on_host(self.model.state_dict())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Whole optimizer state, by name."""
        return on_host(optimizer_tensors(self._optimizer, self.model))

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Restore weights and optimizer state."""
        self.model.load_state_dict(weights)
        load_optimizer_tensors(self._optimizer, self.model, optimizer)


class DeepSpeedEngine(_Forward):
    """DeepSpeed with ZeRO 0 to 3, over nccl or gloo."""

    def __init__(
        self,
        model: DistilledStudent,
        config: EngineConfig,
        stage: StageConfig,
        world: World,
        device: torch.device,
    ):
        import deepspeed

        # Without this, a CPU run compiles a shared-memory op at start that it never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.rank, self.world_size = world.rank, world.world_size
        self.device = device
        self.model = model.to(device)
        self._precision = config.precision
        self._zero_stage = config.zero_stage
        self._clip = stage.gradient_clip
        optimizer = build_optimizer(parameter_groups(model, stage.weight_decay), stage)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(config, stage),
            dist_init_required=False,
        )
        if config.compile:
            self._engine.compile()
        self._callable = self._engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss`` to the step's; ``last`` closes the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; times the world size is the sum.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Clip, update at these rates, clear; returns the norm of the gradient before clipping.

        Nothing is updated where the norm is not finite.
        """
        set_learning_rates(self._engine.optimizer, learning_rates)
        if self._zero_stage == 0:  # DeepSpeed tells no norm there, so it is left to us to clip
            norm = float(_clip_gradient(self.model, self._clip))
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
            return norm
        self._engine.step()
        # A step that was not taken leaves the norm of another one behind in some versions.
        applied = self._engine.was_step_applied()
        return float(self._engine.get_global_grad_norm()) if applied else math.nan

    def model_tensors(self) -> dict[str, Tensor]:
        """Whole float32 weights and buffers, by name; every rank must call, rank 0 gets them."""
        from .deepspeed_state import whole_parameters

        if self._zero_stage == 0:
            return on_host(self.model.state_dict()) if self.rank == 0 else {}
        buffers = on_host(dict(self.model.named_buffers()))
        return {**whole_parameters(self._engine, self.rank == 0), **buffers}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Whole optimizer state, by name; every rank must call, rank 0 gets it."""
        from .deepspeed_state import whole_optimizer_state

        if self._zero_stage == 0:
            whole = optimizer_tensors(self._engine.optimizer, self.model)
            return on_host(whole) if self.rank == 0 else {}
        return whole_optimizer_state(self._engine, self.rank == 0)

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Restore weights and optimizer state, on any world size and ZeRO stage."""
        from .deepspeed_state import load_whole_state

        if self._zero_stage == 0:
            self.model.load_state_dict(weights)
            load_optimizer_tensors(self._engine.optimizer, self.model, optimizer)
        else:
            load_whole_state(self._engine, weights, optimizer)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(weights[name])


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, so that what is written of them is of this step."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to norm ``limit`` (0: leave it); returns the norm before."""
    return nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))


def _deepspeed_config(config: EngineConfig, stage: StageConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # the loop weighs images itself
        "gradient_accumulation_steps": 1,  # the loop says itself which pass is the step's last
        "gradient_clipping": stage.gradient_clip if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            # The default of 5e8 elements is a 2 GB buffer, whatever the student's size.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
