"""What each stage of a recipe costs on given devices."""

import itertools
from collections.abc import Mapping

from radio_distill.plan.time import DeviceType, StagePlan, measurements, plan_stage
from radio_distill.system.progress import Progress

from .planning import Models, measured


def plan_stages(
    models: Models,
    counts: Mapping[str, int],
    device: DeviceType,
    utilisation: float = 0.35,
    with_memory: bool = True,
) -> list[StagePlan]:
    """Plan every stage of one student, each on its own number of devices.

    Args:
        models: of the student.
        counts: devices of each stage; stages of other students are passed over.
        device: their kind.
        utilisation: share of the peak that is reached.
        with_memory: measure memory too, which is most of the work.
    """
    stages = models.stages()
    counts = {name: count for name, count in counts.items() if name in stages}
    total = sum(measurements(stages[name], with_memory) for name in counts)
    done = itertools.count(1)
    teacher_bytes = models.all_teacher_bytes  # counted before, since fake tensors take longer
    plans = []
    with (
        Progress("measuring models without data", total, "views") as bar,
        measured(models, can_compile=not device.is_host) as costs,
    ):
        for name, count in counts.items():
            plan = plan_stage(
                costs,
                name,
                count,
                device,
                teacher_bytes,
                utilisation,
                with_memory,
                lambda: bar.update(next(done)),
            )
            plans.append(plan)
    return plans
