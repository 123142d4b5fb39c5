"""A run, as frozen dataclasses: ``load(yaml) -> override(argv) -> check() -> dump()``.

:mod:`.schema` has the sections (:mod:`.models` teachers and student, :mod:`.objective` losses),
:mod:`.fields` how their fields are declared, :mod:`.reading` the way in and out, :mod:`.rules` what
must hold between fields, :mod:`.students` what a recipe of several students is for each,
:mod:`.resolve` what `auto` means, :mod:`.strict_yaml` what YAML is read, :mod:`.recipes` the
project's own.
Nothing here imports torch.
"""

from .fields import describe_fields, option, plain, share_of, size_pair
from .models import HeadConfig, HeadsConfig, StudentConfig, TeacherConfig
from .objective import AugmentationConfig, LossConfig, NormalizerConfig
from .reading import (
    assignments_of,
    build,
    build_options,
    differences,
    dump,
    load,
    override,
    with_new_names,
)
from .resolve import (
    AUTO,
    AUTO_MICRO_BATCH,
    Facts,
    dtypes_of,
    images_shown,
    keep_resolved,
    place_indexes,
    resolve,
    resolve_data,
    resolve_dtypes,
)
from .rules import check
from .schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FitConfig,
    LogConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    UpsamplerConfig,
    WatchConfig,
    of_summary,
    partition_sizes,
)
from .strict_yaml import parse_yaml, read_yaml, yaml_line
from .students import by_student, for_stage, plain_teacher, section_of, stages_needed
