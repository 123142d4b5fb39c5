"""The README of an exported student: what it is, from whom it learned, what follows from that.

Only what the checkpoint and the run folder hold is said; a section without content is left out.
"""

import re
from typing import Any

from jinja2 import Environment

from ..config import StageConfig, dump, partition_sizes
from ..evals.checkpoint_subjects import student_subject
from ..evals.scores import SCORES, read_scores
from ..train.checkpoint import Checkpoint
from .folded import FoldedStudent

PERMISSIVE = frozenset({"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "mit"})
_RESEARCH = re.compile(r"research|non-?commercial|\bnc\b", re.IGNORECASE)
_CARD = """\
---
library_name: {{ library }}
pipeline_tag: image-feature-extraction
{%- if research %}
license: other
{%- endif %}
tags: [radio, distillation, vision-backbone]
---

# {{ recipe.name }}

{{ "A vision transformer" if vit else "An encoder" }} ({{ student.config.architecture }}, \
{{ "patch" if vit else "stride" }} {{ student.config.patch_size }}, \
{{ "%.1f" % millions }} M parameters) that learned the features of {{ listed(teachers) }}, trained \
with radio_distill. One pass gives a summary and a feature map; a head for each teacher turns them \
into that teacher's own features.

## Use

{{ usage }}

Images are {{ "RGB" if body.bands == 3 else body.bands ~ " bands" }} in [0, 1]\
{% if recipe.data.band_range %} (0 and 1 are {{ recipe.data.band_range | map("list") | list }} of \
the files){% endif %}; height and width are any multiples of {{ step }} px. It was trained at \
{{ listed(sizes) }} px\
{% if vit %}, and its table of positions spans {{ student.config.max_size }} px{% endif %}.

## Teachers

| teacher | model | channels | summary | licence |
| --- | --- | --- | --- | --- |
{%- for name, spec in teachers.items() %}
{%- set teacher = recipe.teachers[name] %}
| {{ name }} | {{ teacher.preset }}{{ ": " ~ teacher.options.model if teacher.options.model }} | \
{{ spec.channels }} | {{ spec.summary_channels or "none" }} | {{ spec.licence }} |
{%- endfor %}

{{ licences }}

## Training

| stage | steps | images a step | sizes (px) |
| --- | --- | --- | --- |
{%- for name, stage in stages.items() %}
| {{ name }} | {{ steps(name) }} | {{ stage.partitions | sum(attribute="batch_size") }} | \
{{ sizes_of(stage) | unique | join(", ") }} |
{%- endfor %}
{%- if scores %}

## Scores

| metric | value | unit | better | protocol |
| --- | --- | --- | --- | --- |
{%- for name, (metric, value, protocol) in scores.items() %}
| {{ name }} | {{ "%.4g" % value }} | {{ metric.unit }} | \
{{ "higher" if metric.higher_is_better else "lower" }} | {{ protocol or "unknown" }} |
{%- endfor %}
{%- endif %}

## Recipe

```yaml
{{ text }}
```
"""


def model_card(student: FoldedStudent, usage: str, library: str) -> str:
    """Write the card as Markdown, with the hub's front matter.

    Args:
        student: what is exported.
        usage: how this format is loaded, Markdown.
        library: the hub's name of the library that loads it.
    """
    checkpoint, recipe = student.checkpoint, student.checkpoint.recipe
    stages = {name: recipe.stages[name] for name in recipe.stages_before(checkpoint.stage)}

    def steps(stage: str) -> str:
        total = recipe.stages[stage].steps
        early = stage == checkpoint.stage and checkpoint.step != total
        return f"{checkpoint.step} of {total}" if early else f"{total}"

    body = student.model.student
    template = Environment(keep_trailing_newline=True).from_string(_CARD)
    return template.render(
        library=library,
        research=_research_only(checkpoint),
        recipe=recipe,
        student=student,
        vit=student.config.body == "vit",
        millions=sum(parameter.numel() for parameter in body.parameters()) / 1e6,
        teachers=checkpoint.teachers,
        usage=usage,
        body=body,
        step=body.size_step,
        sizes=sorted({size for stage in stages.values() for size in _sizes(stage)}),
        licences=licence_note(checkpoint),
        stages=stages,
        steps=steps,
        sizes_of=_sizes,
        scores=_scores(checkpoint),
        text=dump(recipe).strip(),
        listed=lambda names: _listed(list(names)),
    )


def licence_note(checkpoint: Checkpoint) -> str:
    """Say in plain sentences what follows for the student from its teachers' licences."""
    specs, research = checkpoint.teachers, _research_only(checkpoint)
    unknown = [name for name, spec in specs.items() if spec.licence in ("", "unknown")]
    others = [
        f"{name} ({spec.licence})"
        for name, spec in specs.items()
        if name not in (*research, *unknown) and not _is_permissive(spec.licence)
    ]
    sentences = []
    if research:
        sentences.append(
            f"The licence of {_listed(research)} allows research only, so this student is for "
            "research only."
        )
    if unknown:
        sentences.append(
            f"The licence of {_listed(unknown)} is not known: find it out before you share or sell "
            "this student."
        )
    if others:
        sentences.append(
            f"Own conditions come with {_listed(others)}: read what they say of models that learn "
            "from them before you share or sell this student."
        )
    recipe = checkpoint.recipe
    first = recipe.stages[recipe.stages_before(checkpoint.stage)[0]]
    if start := first.start_from or recipe.student.pretrained:
        sentences.append(f"It started from other weights ({start}), whose licence counts too.")
    return " ".join(sentences) or "All of these licences allow any use, with attribution."


def _research_only(checkpoint: Checkpoint) -> list[str]:
    specs = checkpoint.teachers.values()
    return [spec.name for spec in specs if _RESEARCH.search(spec.licence)]


def _is_permissive(licence: str) -> bool:
    """Say whether all licences of a list like ``mit (package), apache-2.0 (weights)`` are free."""
    names = {re.sub(r"\(.*?\)", "", part).strip().lower() for part in licence.split(",")}
    return licence == "none" or names <= PERMISSIVE  # none: random weights


def _sizes(stage: StageConfig) -> list[str]:
    sizes = [size for partition in stage.partitions for size in partition_sizes(partition)]
    return [f"{height}x{width}" for height, width in sizes]


def _scores(checkpoint: Checkpoint) -> dict[str, tuple[Any, float, str]]:
    """Return the run's scores of this student: ``{name: (metric, value, protocol)}``."""
    folder = checkpoint.folder.resolve()
    run, stage = folder.parents[2], folder.parents[1].name
    if not (run / SCORES).is_file():
        return {}
    scores = read_scores([run / SCORES])
    label = scores.label_of(student_subject(checkpoint))
    if label is None and folder == max(folder.parent.glob("step-*"), default=folder):
        # An earlier version wrote no steps; its scores are of the newest one.
        unsaid = ((name, of[0]) for name, of in scores.subjects.items())
        label = next((n for n, of in unsaid if not of.is_known and of.stage == stage), None)
    results = scores.results[label][-1] if label is not None else {}
    how = scores.measured[label] if label is not None else {}
    return {
        name: (scores.definitions[name], value, how[name].protocol)
        for name, value in results.items()
    }


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
