"""A run, as frozen dataclasses: ``load(yaml) -> override(argv) -> check() -> dump()``.

:mod:`.schema` has the fields, :mod:`.reading` the way in and out, :mod:`.checks` what must hold
between fields, :mod:`.resolve` what `auto` means, :mod:`.hints` what is hardly meant. Nothing here
imports torch.
"""

from .checks import check, check_student
from .describing import describe
from .hints import hints
from .reading import (
    assignments_of,
    build,
    differences,
    dump,
    load,
    override,
    parse_yaml,
    read_yaml,
    with_new_names,
)
from .resolve import (
    CHOSEN_ANEW,
    KEPT,
    Facts,
    dtypes_of,
    keep_resolved,
    place_indexes,
    resolve,
    resolve_dtypes,
)
from .schema import (
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FitConfig,
    LogConfig,
    LossConfig,
    NormalizerConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    UpsamplerConfig,
    WatchConfig,
    option,
    partition_sizes,
    plain,
    share_of,
    size_pair,
)

__all__ = [
    "CHOSEN_ANEW",
    "KEPT",
    "AugmentationConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "Facts",
    "FitConfig",
    "LogConfig",
    "LossConfig",
    "NormalizerConfig",
    "PartitionConfig",
    "Recipe",
    "StageConfig",
    "StudentConfig",
    "TeacherConfig",
    "UpsamplerConfig",
    "WatchConfig",
    "assignments_of",
    "build",
    "check",
    "check_student",
    "describe",
    "differences",
    "dtypes_of",
    "dump",
    "hints",
    "keep_resolved",
    "load",
    "option",
    "override",
    "parse_yaml",
    "partition_sizes",
    "place_indexes",
    "plain",
    "read_yaml",
    "resolve",
    "resolve_dtypes",
    "share_of",
    "size_pair",
    "with_new_names",
]
