"""The state of a ZeRO 1-3 engine as whole named tensors, and back.

DeepSpeed's own checkpoints are pickles, cut by world size. Whole float32 weights and Adam moments
in safetensors run no code when they are read and resume on any number of processes and any ZeRO
stage. The price: rank 0 holds the whole state in host memory while it is written.

Getting and setting go through DeepSpeed's documented ``safe_get_*`` and ``safe_set_*``;
only :func:`_create_moments`, :func:`_link_moments` and :func:`_refresh` touch private attributes,
and are tested against the installed version.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .optim import step_of

MOMENTS = ("exp_avg", "exp_avg_sq")
PRODUCT = "mu_product"
"""NAdam's running product of its momentums: one number, the same for every parameter."""


def whole_parameters(engine: Any, keep: bool) -> dict[str, Tensor]:
    """Gather every parameter in float32: all ranks call, those with ``keep`` get the result."""
    from deepspeed.utils import safe_get_full_fp32_param

    tensors = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        if keep:
            tensors[name] = value.detach().float().cpu().clone()
    return tensors


def whole_optimizer_state(engine: Any, keep: bool) -> dict[str, Tensor]:
    """Gather every moment as ``{"<moment>/<parameter>": tensor}``, and ``"step"``."""
    from deepspeed.utils import safe_get_full_optimizer_state

    tensors = {"step": torch.tensor(_steps_done(engine))} if keep else {}
    if not _steps_done(engine):
        return tensors
    _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            value = safe_get_full_optimizer_state(parameter, moment)
            if keep:
                tensors[f"{moment}/{name}"] = value.detach().float().cpu().clone()
        for state in list(_inner(engine).state.values())[:1] if keep else ():
            if PRODUCT in state:
                tensors[f"{PRODUCT}/{name}"] = state[PRODUCT].detach().float().cpu().clone()
    return tensors


def load_whole_state(
    engine: Any, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    """Give each rank its part of whole weights and moments."""
    step = int(optimizer["step"])
    _create_moments(engine)
    for name, parameter in engine.module.named_parameters():
        _set(parameter, weights[name])
        for moment in MOMENTS if step else ():
            _set(parameter, optimizer[f"{moment}/{name}"], moment)
    products = [value for key, value in optimizer.items() if key.startswith(f"{PRODUCT}/")]
    for parameter, state in _inner(engine).state.items():
        state["step"] = step_of(_inner(engine), parameter, step)
        if isinstance(_inner(engine), torch.optim.NAdam):
            state[PRODUCT] = products[0].clone() if products else torch.ones(())
    _refresh(engine)


def _set(parameter: Any, value: Tensor, moment: str = "") -> None:
    """Give this rank its part of a whole weight, or of its moment.

    ZeRO-3 pads the parts of a weight to equal lengths; ``safe_set_full_*`` cannot cut it then.
    """
    from deepspeed import utils

    is_cut = hasattr(parameter, "ds_tensor")
    if is_cut:
        length: int = parameter.ds_tensor.numel()
        first = length * torch.distributed.get_rank(group=parameter.ds_process_group)
        part = value.flatten()[first : first + length]
        value = F.pad(part, (0, length - len(part)))
    if moment:
        set_moment = (
            utils.safe_set_local_optimizer_state if is_cut else utils.safe_set_full_optimizer_state
        )
        set_moment(parameter, value, moment)
    else:
        set_weight = utils.safe_set_local_fp32_param if is_cut else utils.safe_set_full_fp32_param
        set_weight(parameter, value)


def _inner(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _steps_done(engine: Any) -> int:
    for state in _inner(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def _create_moments(engine: Any) -> None:
    """Make empty moments, which DeepSpeed only makes in its first step."""
    zero = engine.optimizer
    partitions = getattr(zero, "single_partition_of_fp32_groups", None)
    if partitions is None:
        partitions = zero.fp32_partitioned_groups_flat
    for partition in partitions:
        if not _inner(engine).state.get(partition):
            _inner(engine).state[partition] = {
                "step": step_of(_inner(engine), partition, 0),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of every parameter group.

    DeepSpeed links them once, after the update of the first group, when those of the other groups
    do not exist yet.
    """
    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _refresh(engine: Any) -> None:
    """Copy the restored master weights into the weights that the forward pass uses."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for index, partition in enumerate(zero.fp32_partitioned_groups_flat):
            if partition.numel():
                zero.fp16_partitioned_groups_flat[index].data.copy_(partition.data)
            zero._reassign_or_swap_out_partitioned_parameters(index)
        return
    from deepspeed.runtime.utils import all_gather_dp_groups

    groups = zip(
        zero.parallel_partitioned_bit16_groups,
        zero.single_partition_of_fp32_groups,
        zero.real_dp_process_group,
        strict=True,
    )
    for parts, master, group in groups:
        parts[torch.distributed.get_rank(group=group)].data.copy_(master.data)
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
