"""What counts: the 31 metrics behind FeatSharp's Table 2 (arXiv 2502.16025), in its seven groups.

A table of published metrics is frozen, so that Δm is the paper's Δm: names, groups, directions and
order do not change. Scores of these names need no definitions file, whoever wrote them.
"""

from collections.abc import Iterable, Mapping

from .gain import Metric

_RECALLS = {"text_to_image@1": "%", "image_to_text@1": "%"}

_GROUPS: dict[str, dict[str, dict[str, str]]] = {
    "Classification": {"imagenet_zero_shot": {"top1": "%"}, "imagenet_knn": {"top1": "%"}},
    "Dense": {"ade20k": {"miou": "%"}, "voc": {"miou": "%"}, "sam_coco": {"iou": "%"}},
    "Probe3D": {
        "navi_depth": {"mean_share": "%"},
        "navi_normals": {"mean_share": "%"},
        "navi_correspondence": {"mean_recall": "%"},
        "spair": {"recall@0.10": "%"},
    },
    "Retrieval": {"coco_retrieval": _RECALLS, "flickr_retrieval": _RECALLS},
    "Pascal Context": {
        "pascal_context": {
            "semseg_miou": "%", "parts_miou": "%", "saliency_maxf": "%", "normals_mean": "°"
        }
    },
    "NYUDv2": {"nyud": {"semseg_miou": "%", "depth_rmse": "m", "normals_mean": "°"}},
    "VILA": {
        "ai2d_no_mask": {"exact_match": "%"},
        "chartqa": {"relaxed_overall": "%"},
        "docvqa_val": {"anls": "%"},
        "gqa": {"exact_match": "%"},
        "infovqa_val": {"anls": "%"},
        "mme": {"mme_perception_score": "points"},
        "mmmu_val": {"mmmu_acc": "%"},
        "ocrbench": {"ocrbench_accuracy": "points"},
        "pope": {"pope_f1_score": "%"},
        "seedbench": {"seed_all": "%"},
        "textvqa_val": {"exact_match": "%"},
    },
}  # fmt: skip
"""Group, benchmark, metric and unit; tasks of VILA are called as lmms-eval calls them."""

HEADLINES: dict[str, Metric] = {
    f"{benchmark}/{name}": Metric(group=group, higher_is_better=unit not in ("°", "m"), unit=unit)
    for group, benchmarks in _GROUPS.items()
    for benchmark, metrics in benchmarks.items()
    for name, unit in metrics.items()
}
"""By ``benchmark/metric``, in the order of the paper's tables."""


def in_order(definitions: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return definitions in the order of the paper's tables, all others behind."""
    names = [*(name for name in HEADLINES if name in definitions), *definitions]
    return {name: definitions[name] for name in dict.fromkeys(names)}


def coverage(names: Iterable[str]) -> str:
    """Say how much of Table 2 the metrics are that count; empty where they are none of it."""
    counting = set(names)
    present = counting & HEADLINES.keys()
    if not present:
        return ""
    text = f"{len(present)} of the {len(HEADLINES)} metrics of FeatSharp's Table 2 count here"
    if others := len(counting) - len(present):
        text += f", beside {others} others"
    lacking = dict.fromkeys(HEADLINES[name].group for name in HEADLINES if name not in present)
    return f"{text}; lacking in {', '.join(lacking)}." if lacking else f"{text}."
