"""DeepSpeed as the engine of a run, and which engine a run has."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import EngineConfig
from ..errors import ConfigError
from ..models.gradients import touch
from ..system.distributed import World, all_gather_object
from .deepspeed_state import load_whole_state, whole_optimizer_state, whole_parameters
from .engine import Closing, Engine, SingleProcessEngine, clip_gradient, on_host
from .optim import load_optimizer_tensors, optimizer_tensors, set_learning_rates

BUCKET_BYTES = 32 << 20
"""Enough that a link is busy, few enough that the first leave early; PyTorch's DDP has 25 MB."""


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    gradient_clip: float,
    world: World,
    device: torch.device,
) -> Engine:
    """Make the engine that the recipe asks for; :func:`engine_name` has checked that it can be.

    Arguments are those of :class:`.engine.Engine`, and this process's place.
    """
    if _kind(config, world.world_size) == "single":
        return SingleProcessEngine(model, optimizer, config, gradient_clip, device)
    return DeepSpeedEngine(model, optimizer, config, gradient_clip, world, device)


def engine_name(
    config: EngineConfig, world_size: int, optimizer: str, with_ema: bool = False
) -> str:
    """Return which engine a run has, ``single`` or ``deepspeed``.

    Args:
        config: the recipe's engine section.
        world_size: processes of the run.
        optimizer: its name.
        with_ema: whether the run keeps an EMA of its weights.

    Raises:
        ConfigError: where that engine cannot do what the recipe asks.
    """
    name = _kind(config, world_size)
    if name == "single":
        if world_size > 1:
            raise ConfigError(
                f"engine.name: single runs one process, but {world_size} were started; "
                "set it to auto"
            )
        return name
    if optimizer == "lamb" and config.zero_stage in (1, 2, 3):
        raise ConfigError(
            "engine.zero_stage: lamb needs the norm of whole parameters, which ZeRO flattens and "
            "cuts up; set engine.zero_stage to 0, or the stage's optimizer to adamw"
        )
    if config.compile is True and config.zero_stage == 3:
        raise ConfigError(
            "engine.compile: ZeRO 3 brings weights to each layer by hooks, at which a graph ends; "
            "set it to false, or engine.zero_stage to 2"
        )
    if with_ema and config.zero_stage == 3:
        raise ConfigError(
            "engine.zero_stage: 3 cuts up the weights that ema_decay averages; "
            "set engine.zero_stage to 2, or ema_decay to 0"
        )
    return name


def _kind(config: EngineConfig, world_size: int) -> str:
    if config.name != "auto":
        return config.name
    return "deepspeed" if world_size > 1 else "single"


def zero_hint(config: EngineConfig) -> str:
    """Say what makes the weights, gradients and moments of a model take less memory."""
    return f"raise engine.zero_stage (now: {config.zero_stage}), or take a smaller student"


class GradientBuckets:
    """Sums gradients over all processes, a bucket of some parameters at a time.

    A bucket leaves as soon as the last pass of a step has reached all of it and those before it
    have left. So buckets leave in one order on every process, whatever its passes are of, and
    nobody waits for the device. The gradients become views of the buckets, so they take no more
    memory than before, but for one bucket.

    Args:
        parameters: all that are trained; each asks for a gradient.
        bucket_bytes: size from which a bucket is full.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self._buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(list(parameters)):  # as a backward pass comes by, more or less
            full = sum(it.numel() * it.element_size() for it in self._buckets[-1]) >= bucket_bytes
            if full:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(self._arrive)
        self._bucket_of = {it: index for index, some in enumerate(self._buckets) for it in some}
        self._is_open = False
        self._missing: list[int] = []
        """Parameters of each bucket that the last pass has not reached yet."""
        self._sent: list[Any] = []
        """What to wait for, by bucket."""

    def open(self) -> None:
        """Begin to send: the backward pass that comes is the last of its step."""
        self._is_open, self._sent = True, []
        self._missing = [len(bucket) for bucket in self._buckets]

    def close(self) -> None:
        """Send what the pass did not reach, and make the device wait for all; every rank calls."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for work in self._sent:
            work.wait()
        self._is_open = False

    def _arrive(self, parameter: nn.Parameter) -> None:
        if self._is_open:
            self._missing[self._bucket_of[parameter]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        grads = [torch.zeros_like(it) if it.grad is None else it.grad for it in bucket]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        parts = flat.split([it.numel() for it in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
        self._sent.append(dist.all_reduce(flat, async_op=True))


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO 0 to 3, over nccl or gloo."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        gradient_clip: float,
        world: World,
        device: torch.device,
    ):
        import deepspeed

        # Without this, a CPU run compiles a shared-memory op at start that it never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.rank, self.world_size = world.rank, world.world_size
        self._zero_stage = config.zero_stage
        self.cuts_weights = config.zero_stage == 3
        # DeepSpeed broadcasts parameters as bytes, which a tensor without dimensions cannot be
        # seen as; ZeRO leaves them the dimension that they have while it starts.
        scalars = [(name, it) for name, it in model.named_parameters() if it.ndim == 0]
        self._scalars = {name for name, _ in scalars}
        for _, parameter in scalars:
            parameter.data = parameter.data.view(1)
        super().__init__(model, optimizer, config, gradient_clip, device)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(config, gradient_clip, world.world_size),
            dist_init_required=False,
        )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._buckets: GradientBuckets | None = None
        if self._zero_stage == 0:
            for _, parameter in scalars:
                parameter.data = parameter.data.view(())
            # DeepSpeed's own sum begins behind the backward pass, of a copy of all gradients.
            self._buckets = GradientBuckets(trained)
            self._engine.set_gradient_accumulation_boundary(False)
        self._callable, self._optimizer = self._engine, self._engine.optimizer
        self._arrived: list[nn.Parameter] = []
        """Parameters in the order in which a pass gives them gradients; of ZeRO 1 and 2."""
        self._is_same_order = self._zero_stage not in (1, 2) or world.world_size == 1
        self._recording = [
            parameter.register_post_accumulate_grad_hook(self._arrived.append)
            for parameter in (trained if self._zero_stage in (1, 2) else ())
        ]

    def _add_gradient(self, loss: Tensor, last: bool, closing: Closing | None) -> None:
        if self._buckets is not None:
            self._add_in_buckets(self._buckets, loss, last, closing)
            return
        self._engine.set_gradient_accumulation_boundary(last and closing is None)
        # DeepSpeed averages over ranks; times the world size is the sum. A step is skipped by a
        # gradient that is not finite: ZeRO 1 to 3 hold parts of it in buffers of their own, which
        # they clear where they find an overflow themselves, and in no public way else.
        self._engine.backward(loss * float(self.world_size), scale_wrt_gas=False)
        while self._recording:
            self._recording.pop().remove()
        if closing is not None:
            self._engine.set_gradient_accumulation_boundary(True)
            # The factor is in what it is made of. ZeRO reduces what has a gradient in the last
            # pass, so everything gets one.
            reached = touch(*self.model.parameters())
            self._engine.backward(closing() + reached, scale_wrt_gas=False)

    def _add_in_buckets(
        self, buckets: GradientBuckets, loss: Tensor, last: bool, closing: Closing | None
    ) -> None:
        if last and closing is None:
            buckets.open()
        self._engine.backward(loss, scale_wrt_gas=False)
        if closing is not None:
            buckets.open()
            self._engine.backward(closing(), scale_wrt_gas=False)
        if last:
            buckets.close()

    def whole(self, weights: Sequence[Tensor]) -> AbstractContextManager[Any]:
        if not self.cuts_weights:
            return super().whole(weights)
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(weights)
        return gathered

    def zero(self) -> Tensor | None:
        """Return a loss for a pass without images, which gives each weight zeros.

        ZeRO 1 and 2 reduce gradients in the order of their arrival, which must be that of the other
        ranks: it is taken from the first pass, whatever that was, since all passes run all modules
        alike. Autograd adds up a gradient as soon as it is there, so a chain keeps any order.
        ZeRO 3 gathers weights as each module's forward and backward begin, some of them ahead: no
        rank can take part without running the modules, so there is no such loss.
        """
        if self._zero_stage == 0:
            return super().zero()
        if self._zero_stage == 3 or not self._arrived:
            return None
        loss = touch(self._arrived[-1])
        for parameter in reversed(self._arrived[:-1]):
            loss = touch(loss, parameter)
        return loss

    def step(self, learning_rates: Mapping[str, float]) -> bool:
        set_learning_rates(self._optimizer, learning_rates)
        if self._zero_stage == 0:  # DeepSpeed tells no norm there, so it is left to us to clip
            self._norm = float(clip_gradient(self.model, self._clip))
            is_taken = math.isfinite(self._norm)
            if is_taken:
                self._engine.set_gradient_accumulation_boundary(True)
                self._engine.step()
                self._engine.set_gradient_accumulation_boundary(False)
            else:
                self._engine.zero_grad()
            return is_taken
        if not self._is_same_order:
            self._check_order()
        self._engine.step()  # which waits once, for whether the norm is finite
        is_taken = bool(self._engine.was_step_applied())
        # A step that was not taken leaves the norm of another one behind in some versions.
        self._norm = self._engine.get_global_grad_norm() if is_taken else math.nan
        return is_taken

    def _check_order(self) -> None:
        """Check once that gradients come in one order everywhere: else wrong ones are added up."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        first, *others = all_gather_object([[names[id(it)] for it in self._arrived]])
        if any(other != first for other in others):
            raise ConfigError(
                f"engine.zero_stage: {self._zero_stage} adds up gradients as they come, and here "
                "they come in another order on another process; set it to 0"
            )
        self._is_same_order = True

    def model_tensors(self) -> dict[str, Tensor]:
        if self._zero_stage == 0:
            return on_host(self.model.state_dict()) if self.rank == 0 else {}
        kept = self.model.state_dict().keys()
        buffers = {name: value for name, value in self.model.named_buffers() if name in kept}
        whole = self._without_dimension(whole_parameters(self._engine, self.rank == 0))
        return {**whole, **on_host(buffers)}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        if self._zero_stage == 0:
            whole = optimizer_tensors(self._optimizer, self.model)
            return on_host(whole) if self.rank == 0 else {}
        return self._without_dimension(whole_optimizer_state(self._engine, self.rank == 0))

    def _without_dimension(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of scalar parameters as scalars again."""
        return {
            name: value.view(()) if name.rpartition("/")[2] in self._scalars else value
            for name, value in tensors.items()
        }

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        if self._zero_stage == 0:
            self.model.load_state_dict(weights)
            load_optimizer_tensors(self._optimizer, self.model, optimizer)
        else:
            load_whole_state(self._engine, weights, optimizer)
            for name, buffer in self.model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])


def _deepspeed_config(
    config: EngineConfig, gradient_clip: float, world_size: int
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # a task weighs images itself
        "gradient_accumulation_steps": 1,  # and says which pass is the step's last
        "gradient_clipping": gradient_clip if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            # The default of 5e8 elements is a 2 GB buffer, whatever the student's size.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # Sums leave while the backward pass runs. The host waits for the device behind each
            # pass that is summed (the last under ZeRO 1, all under 2), which is far less.
            "overlap_comm": config.zero_stage in (1, 2) and world_size > 1,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        # It would wait for the device before every forward pass.
        "timers": {"throughput": {"enabled": False}},
    }
