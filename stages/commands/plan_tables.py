"""The tables of ``radio-distill plan``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from radio_distill.config import share_of
from radio_distill.system.progress import duration

from .plan import Models

if TYPE_CHECKING:
    from torch import nn

    from radio_distill.plan.time import DeviceType, StagePlan


def all_tables(
    models: Models, plans: "Sequence[StagePlan]", device: "DeviceType", price: float
) -> list[Table]:
    """Make every table, in the order they are read.

    Args:
        models: of the recipe.
        plans: of its stages.
        device: kind of device.
        price: of one device for an hour; 0 leaves the column out.
    """
    return [
        student_table(models),
        teacher_table(models, plans),
        partition_table(plans),
        memory_table(plans, device),
        time_table(plans, price),
        resolved_table(models, plans),
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def student_table(models: Models) -> Table:
    """Describe the student."""
    config, student = models.recipe.student, models.student
    table = _table("Student", "architecture", "body", "heads", "patch", "prefix tokens", "start")
    table.add_row(
        config.architecture,
        _count(student.student),
        _count(student.adaptors),
        f"{config.patch_size} px",
        str(student.student.num_prefix_tokens),
        config.pretrained or "random",
    )
    return table


def teacher_table(models: Models, plans: "Sequence[StagePlan]") -> Table:
    """Describe the teachers: a row for each way in which one is used."""
    table = _table(
        "Teachers", "name", "preset", "parameters", "GiB", "input", "target grid",
        "images / image", "GFLOP / image", "licence",
    )  # fmt: skip
    costs = [cost for plan in plans for item in plan.partitions for cost in item.teachers]
    for cost in dict.fromkeys(
        cost for name in models.teachers for cost in costs if cost.view.teacher == name
    ):
        name, images = cost.view.teacher, cost.view.images_per_input
        table.add_row(
            name,
            models.recipe.teachers[name].preset,
            _count(models.tower(name)),
            f"{models.teacher_bytes(name) / 2**30:.1f}",
            _size(cost.view.encoded),
            _size(cost.view.grid),
            str(cost.calls) if images == 1 else f"1/{images}",
            f"{cost.flops / 1e9:,.1f}",
            models.teachers[name].spec.licence,
        )
    return table


def partition_table(plans: "Sequence[StagePlan]") -> Table:
    """Describe the partitions; where a size is drawn, by their means."""
    table = _table(
        "Partitions (shares of the work make good `ranks`)", "stage", "partition", "student",
        "rendered at",
        "images / step", "tokens / image", "student GFLOP", "teachers GFLOP", "share of work",
    )  # fmt: skip
    for plan in plans:
        total = plan.student_flops + plan.teacher_flops
        for cost in plan.partitions:
            images = cost.partition.batch_size
            work = images * (cost.student_flops + cost.teacher_flops)
            table.add_row(
                plan.name,
                cost.partition.name,
                ", ".join(map(_size, cost.partition.sizes)),
                ", ".join(map(_size, cost.rendered)),
                f"{images:,}",
                f"{cost.tokens:,.0f}",
                f"{cost.student_flops / 1e9:,.1f}",
                f"{cost.teacher_flops / 1e9:,.1f}",
                f"{work / total:.1%}",
            )
    return table


_MEND = "lower engine.micro_batch or raise engine.zero_stage"


def memory_table(plans: "Sequence[StagePlan]", device: "DeviceType") -> Table:
    """Say what lies on the fullest device."""
    parts = ("weights", "gradients", "optimizer", "average", "teachers", "step")
    table = _table("Memory of a device, GiB", "stage", *parts, "total", "of", "")
    for plan in plans:
        memory = plan.memory
        sizes = [*(getattr(memory, part) for part in parts), memory.total]
        verdict = "fits" if memory.fits(device) else f"[bold red]does not fit[/]: {_MEND}"
        table.add_row(
            plan.name, *(f"{size / 2**30:.2f}" for size in sizes), f"{device.memory:g}", verdict
        )
    return table


def time_table(plans: "Sequence[StagePlan]", price: float) -> Table:
    """Say how long each stage takes."""
    table = _table(
        "Time", "stage", "devices", "steps", "images / step", "tokens / step", "student FLOP",
        "teachers FLOP", "a step", "devices busy", "decoding cores", "time", "device time",
        *(["price"] if price else []),
    )  # fmt: skip
    for plan in plans:
        table.add_row(
            plan.name, str(plan.devices), f"{plan.steps:,}", f"{plan.images:,}",
            f"{plan.tokens:,.0f}",
            _flops(plan.student_flops), _flops(plan.teacher_flops),
            duration(plan.step_seconds), f"{plan.busy:.0%}",
            f"{plan.decoding_cores:.1f}", *_times([plan], price),
        )  # fmt: skip
    table.add_row("all", *[""] * 9, *_times(plans, price), style="bold")
    return table


def resolved_table(models: Models, plans: "Sequence[StagePlan]") -> Table:
    """Say what each stage makes of fields that are `auto`, and of shares."""
    table = _table(
        "Resolved; the shards may hold fewer images", "stage", "body frozen for",
        "images of statistics", "precision", "ZeRO stage", "log every",
        "save every",
    )  # fmt: skip
    for plan in plans:
        stage = models.stage(plan.name)
        table.add_row(
            plan.name,
            f"{stage.frozen_steps:,} of {plan.steps:,} steps",
            f"{share_of(stage.normalizer.images, plan.steps * plan.images):,}",
            stage.engine.precision,
            str(stage.engine.zero_stage) if plan.devices > 1 else "-",
            f"{stage.log.every} steps",
            f"{stage.log.save_every} steps",
        )
    return table


def _times(plans: "Sequence[StagePlan]", price: float) -> list[str]:
    device_hours = sum(plan.device_hours for plan in plans)
    cells = [duration(3600 * sum(plan.hours for plan in plans)), duration(3600 * device_hours)]
    return [*cells, f"{device_hours * price:,.2f}"] if price else cells


def _flops(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value / 1e9:.3g} G"


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _count(module: "nn.Module") -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f} M"
