"""The contestants of ``benchmarks.peers``, each in a process of its own, under any Python.

A worker trains without end. After each round of steps it prints one line and waits for a line to
go on, so that the one who started it can let several take turns. One teacher, one student, one
folder of images; what differs is written at each function.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

MARK = "PEER "
STUDENT, TEACHER = "vit_tiny_patch16_224", "vit_small_patch14_dinov2.lvd142m"
SIDE = 224
CROP = (0.5, 1.0)
"""Share of a photograph's area, as all contestants crop."""


class Pacer:
    """Called after each step; stops after a round until it is told to go on.

    Args:
        steps: of a round.
    """

    def __init__(self, steps: int):
        self._steps, self._done, self._begin = steps, 0, time.process_time()

    def __call__(self, *_: Any, **__: Any) -> None:
        """Count a step; ends the process where nobody waits any more."""
        self._done += 1
        if self._done % self._steps:
            return
        seconds = time.process_time() - self._begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        figures = json.dumps({"seconds": seconds, "memory": memory})
        print(f"\n{MARK}{figures}", flush=True)  # a progress bar may have left its line open
        if not sys.stdin.readline():
            os._exit(0)
        self._begin = time.process_time()


def ours(options: argparse.Namespace, step: Pacer) -> None:
    """radio_distill's own stage: two heads of two layers, PHI-S, both losses, log and watchdog."""
    from radio_distill.config import load
    from radio_distill.distill.task import Distillation
    from stages.build import train_stage

    folder = options.folder / "ours"
    folder.mkdir()
    partition = f"{{name: all, size: {SIDE}, teachers: [dino], batch_size: {options.batch}}}"
    text = (
        f"name: peer\noutput: {folder}\n"
        f"data: {{shards: ['{options.folder / 'shards'}'], workers: 0, crop_scale: {list(CROP)}}}\n"
        f"student: {{architecture: {STUDENT}, max_size: {SIDE}, head_hidden: 384, registers: 0}}\n"
        f"teachers: {{dino: {{preset: vits14_packaged, input_size: {SIDE}, "
        f"dtype: {options.dtype}}}}}\n"
        f"normalizer: {{images: 64}}\n"
        f"stages: {{stage1: {{steps: 100000, optimizer: adamw, partitions: [{partition}]}}}}\n"
        f"engine: {{precision: {options.dtype}, device: {options.device}}}\n"
        "log: {trackers: []}\n"
    )
    (folder / "peer.yaml").write_text(text, encoding="utf-8")
    end_step = Distillation.end_step

    def end(task: Any, is_taken: bool) -> None:
        end_step(task, is_taken)
        step()

    Distillation.end_step = end  # type: ignore[assignment, method-assign]
    train_stage("stage1", load(folder / "peer.yaml"))


def by_hand(options: argparse.Namespace, step: Pacer) -> None:
    """The shortest loop that learns from tokens: one linear head, squared distance, AdamW."""
    import timm
    import torch
    import torch.nn.functional as F

    device = torch.device(options.device)
    student = timm.create_model(STUDENT, num_classes=0).to(device)
    teacher = _teacher().to(device)
    head = torch.nn.Linear(student.embed_dim, teacher.embed_dim).to(device)
    parameters = [*student.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for pixels in _batches(options):
        pixels = pixels.to(device)
        with _autocast(options):
            with torch.no_grad():
                wanted = teacher.forward_features(pixels)
            given = head(student.forward_features(pixels))
        maps = _map(given).float(), _map(wanted).float()
        aligned = F.interpolate(maps[1], maps[0].shape[-2:], mode="bilinear", antialias=True)
        loss = F.mse_loss(maps[0], aligned) + F.mse_loss(given[:, 0].float(), wanted[:, 0].float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step()


def timm_task(options: argparse.Namespace, step: Pacer) -> None:
    """timm's FeatureDistillationTask: pooled features only; timm's loader; a loop around them."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from timm.task import FeatureDistillationTask

    device = torch.device(options.device)
    student = timm.create_model(STUDENT, num_classes=1).to(device)
    task = FeatureDistillationTask(
        student,
        _teacher(),
        criterion=torch.nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        task_loss_weight=0.0,
        device=device,
        verbose=False,
    ).train()
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-4)
    loader = create_loader(
        create_dataset("", str(options.folder / "images")), (3, SIDE, SIDE), options.batch,
        is_training=True, use_prefetcher=False, scale=CROP, ratio=(1.0, 1.0), color_jitter=0.0,
        interpolation="bicubic", num_workers=0, persistent_workers=False,
    )  # fmt: skip
    while True:
        for pixels, labels in loader:
            with _autocast(options):
                loss = task(pixels.to(device), labels.to(device))["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.trainable_module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step()


def lightly(options: argparse.Namespace, step: Pacer) -> None:
    """lightly-train's distillation of patch features, by its own command; needs that package."""
    import lightly_train
    from lightly_train._methods.distillationv2.distillationv2 import DistillationV2

    # Its `callbacks` take its own by name only, so the hook of Lightning's module tells of steps.
    DistillationV2.on_train_batch_end = lambda *_, **__: step()
    lightly_train.pretrain(
        out=str(options.folder / "lightly"),
        data=str(options.folder / "images"),
        model=f"timm/{STUDENT}",
        method="distillationv2",
        method_args={"teacher": "dinov2/vits14-noreg-notpretrained", "n_teacher_blocks": 1},
        epochs=100000,
        batch_size=options.batch,
        num_workers=0,
        devices=1,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        precision="bf16-mixed" if options.dtype == "bfloat16" else "32-true",
        transform_args={
            "image_size": (SIDE, SIDE),
            "random_resize": {"min_scale": CROP[0], "max_scale": CROP[1]},
            "color_jitter": None,
            "random_gray_scale": None,
            "gaussian_blur": None,
        },
        optim="adamw",
        model_args={"pretrained": False},
    )


def _teacher() -> Any:
    """Return DINOv2's ViT-S/14 with random weights, frozen."""
    import timm

    teacher = timm.create_model(TEACHER, pretrained=False, num_classes=0, img_size=SIDE)
    return teacher.eval().requires_grad_(False)


def _batches(options: argparse.Namespace) -> Iterator[Any]:
    """Yield normalised images without end, through torchvision, as tutorials do."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    bicubic = transforms.InterpolationMode.BICUBIC
    views = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, CROP, (1.0, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    data = ImageFolder(str(options.folder / "images"), views)
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True)
    while True:
        for pixels, _ in loader:
            yield pixels


def _map(tokens: Any) -> Any:
    """Return the map ``[B, C, h, w]`` of ``[B, 1 + h * w, C]`` tokens of a square image."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def _autocast(options: argparse.Namespace) -> Any:
    import torch

    if options.dtype == "float32":
        return nullcontext()
    return torch.autocast(options.device, torch.bfloat16)


CONTESTANTS = {"ours": ours, "by hand": by_hand, "timm": timm_task, "lightly-train": lightly}


def main() -> None:
    """Train as one contestant until nobody waits any more."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--folder", type=Path, required=True, help="with images and shards")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of a round")
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"))
    options = parser.parse_args()
    CONTESTANTS[options.contestant](options, Pacer(options.steps))


if __name__ == "__main__":
    main()
