"""Tiny data sets in the layouts of the published ones, one function a layout.

Each function fills an empty folder and returns it. Pictures show their labels: one colour a class.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radio_distill.evals.datasets.coco import Coco

SIZE = (48, 40)
"""Width and height of every image."""


def save(path: Path, array: np.ndarray) -> Path:
    """Write an array as the image that the suffix says, JPEGs with all their colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "subsampling": 0} if path.suffix in (".jpg", ".JPEG") else {}
    Image.fromarray(array).save(path, **options)
    return path


def write(path: Path, text: str) -> Path:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file."""
    return write(path, json.dumps(data))


def regions(generator: np.random.Generator, numbers: list[int]) -> np.ndarray:
    """A label map of 8 px blocks that shows each of ``numbers``, ``[H, W]`` uint8."""
    width, height = SIZE[0] // 8, SIZE[1] // 8
    blocks = generator.choice(np.array(numbers, dtype=np.uint8), (height, width))
    blocks.flat[: len(numbers)] = numbers
    return np.kron(blocks, np.ones((8, 8), dtype=np.uint8))


def painted(numbers: np.ndarray) -> np.ndarray:
    """A image in which each number of a label map has a colour of its own, ``[H, W, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)[numbers]


def ade20k(root: Path, train: int = 3, val: int = 2) -> Path:
    """ADEChallengeData2016 with classes 1 to 4 and unlabelled pixels."""
    generator = np.random.default_rng(0)
    for folder, short, count in (("training", "train", train), ("validation", "val", val)):
        for number in range(1, count + 1):
            stem = f"{folder}/ADE_{short}_{number:08d}"
            mask = regions(generator, [0, 1, 2, 3, 4])
            save(root / "images" / f"{stem}.jpg", painted(mask))
            save(root / "annotations" / f"{stem}.png", mask)
    return root


def voc(root: Path, train: int = 2, val: int = 2, aug: int = 3) -> Path:
    """VOC2012 with background, two classes and void; ``aug`` images more in trainaug."""
    generator = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "val": [], "aug": []}
    for number in range(train + val + aug):
        split = "train" if number < train else "val" if number < train + val else "aug"
        lists[split].append(f"2007_{number:06d}")
        stem = lists[split][-1]
        numbers = regions(generator, [0, 1, 15, 255])
        save(root / "JPEGImages" / f"{stem}.jpg", painted(numbers))
        mask = Image.fromarray(numbers)
        mask.putpalette([value for index in range(256) for value in (index, 7, 255 - index)])
        for folder in ["SegmentationClass"] * (split != "aug") + ["SegmentationClassAug"] * (
            aug > 0
        ):
            (root / folder).mkdir(exist_ok=True)
            mask.save(root / folder / f"{stem}.png")
    if aug:
        lists["trainaug"] = lists["train"] + lists["aug"]
    for name, stems in lists.items():
        write(root / "ImageSets" / "Segmentation" / f"{name}.txt", "\n".join(stems) + "\n")
    return root


VOC_NAMES = [
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep", "couch",
    "train", "tv",
]  # fmt: skip
"""VOC's classes from 1 on, by COCO's names."""


def voc_of_coco(root: Path, data: Coco) -> Path:
    """VOC2012 of COCO's images and masks: crowds are void, other classes are background."""
    for split in ("train", "val"):
        found = data.objects(split)
        names = list(found.categories.values())
        for image in found.images:
            mask = np.zeros((image.height, image.width), dtype=np.uint8)
            for item in sorted(found.objects, key=lambda item: -item.area):
                if item.image == image and names[item.category] in VOC_NAMES:
                    number = 255 if item.crowd else 1 + VOC_NAMES.index(names[item.category])
                    mask[item.mask().numpy()] = number
            save(root / "SegmentationClass" / f"{image.path.stem}.png", mask)
            (root / "JPEGImages").mkdir(exist_ok=True)
            (root / "JPEGImages" / image.path.name).symlink_to(image.path)
        stems = "\n".join(image.path.stem for image in found.images)
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", stems + "\n")
    return root


def imagenet(root: Path, train: int = 4, val: int = 2) -> Path:
    """ImageNet-1k: ``train`` and ``val`` images of each of its classes 0, 2 and 9, by colour."""
    generator = np.random.default_rng(0)
    for number, wnid in ((0, "n01440764"), (2, "n01484850"), (9, "n01518878")):
        for split, count in (("train", train), ("val", val)):
            for index in range(count):
                shade = generator.integers(0, 8, (*SIZE[::-1], 3), dtype=np.uint8)
                pixels = painted(np.full(SIZE[::-1], number)) // 8 * 7 + shade
                save(root / split / wnid / f"{wnid}_{index}.JPEG", pixels)
    return root


def coco(root: Path, train: int = 3, val: int = 2) -> Path:
    """COCO 2017: in each picture a person (a polygon) and a crowd of dogs (a code).

    Their number in COCO is 1 and 18, their colour that of :func:`painted`.
    """
    generator = np.random.default_rng(0)
    width, height = SIZE
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    for split, count in (("train", train), ("val", val)):
        images, objects = [], []
        for number in range(1, count + 1):
            image = {"id": 100 + number, "file_name": f"{number:012d}.jpg"}
            images.append(image | {"height": height, "width": width})
            left, top = (int(value) for value in generator.integers(0, 8, 2))
            shown = np.zeros((height, width), dtype=np.uint8)
            shown[top : top + 16, left : left + 12] = 1
            shown[24:36, 20:40] = 18
            save(root / f"{split}2017" / image["file_name"], painted(shown))
            box = [left, top, 12, 16]
            corners = [left, top, left + 12, top, left + 12, top + 16, left, top + 16]
            person = {"bbox": box, "area": 192, "iscrowd": 0, "segmentation": [corners]}
            person |= {"id": 2 * number, "image_id": image["id"], "category_id": 1}
            crowd = {"bbox": [20, 24, 20, 12], "area": 240, "iscrowd": 1}
            crowd |= {"id": 2 * number + 1, "image_id": image["id"], "category_id": 18}
            crowd["segmentation"] = {"size": [height, width], "counts": run_lengths(shown == 18)}
            objects += [person, crowd]
        data = {"images": images, "annotations": objects, "categories": categories}
        write_json(root / "annotations" / f"instances_{split}2017.json", data)
    return root


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's code of a mask: lengths of runs down its columns, of zeros first."""
    flat = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def coco_retrieval(root: Path, pictures: int = 4, captions: int = 5) -> Path:
    """CLIP_benchmark's COCO; texts begin with the number of their image, which has one colour."""
    images, texts = [], []
    for number in range(pictures):
        name = f"COCO_val2014_{number:012d}.jpg"
        save(root / "val2014" / name, painted(np.full(SIZE[::-1], number)))
        images.append({"id": number, "file_name": name})
        for index in range(captions):
            text = f"{number}, an image, said in words {index}"
            texts.append({"id": len(texts), "image_id": number, "caption": text})
    write_json(root / "coco_test_karpathy.json", {"images": images, "annotations": texts})
    return root


def flickr30k(root: Path, pictures: int = 4, captions: int = 5) -> Path:
    """CLIP_benchmark's Flickr30k; as :func:`coco_retrieval`."""
    lines = ["image,caption"]
    for number in range(pictures):
        name = f"{1000 + number}.jpg"
        save(root / name, painted(np.full(SIZE[::-1], number)))
        lines += [
            f"{name},{number}, an image, said in {index}.jpg, words" for index in range(captions)
        ]
    write(root / "flickr30k_test_karpathy.txt", "\n".join(lines) + "\n")
    return root


def texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth pattern over a plane, in which every place of [-1, 1]^2 has its own colour."""
    channels = [
        127 + 120 * np.sin(1.4 * x),
        127 + 120 * np.sin(1.4 * y),
        127 + 60 * np.cos(9 * x * y),
    ]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def spair(root: Path, pictures: int = 3) -> Path:
    """SPair-71k: of two classes ``pictures`` views of one pattern, in all pairs.

    View ``i`` is moved by (3 i, 2 i) pixels, and so are its four keypoints.
    """
    width, height = SIZE
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    for number, category in enumerate(("cat", "train")):
        points, boxes = [], []
        for index in range(pictures):
            x, y = (columns - 3 * index) / width - 0.5, (rows - 2 * index) / height - 0.5
            save(
                root / "JPEGImages" / category / f"2008_00000{index}.jpg",
                texture(x - 0.4 * number, y),
            )
            moved = np.array([3 * index, 2 * index])
            points.append((np.array([[10, 10], [30, 10], [10, 26], [30, 26]]) + moved).tolist())
            boxes.append((np.array([[8, 8], [34, 30]]) + moved).reshape(-1).tolist())
        pairs = [(a, b) for a in range(pictures) for b in range(pictures) if a != b]
        for count, (a, b) in enumerate(pairs):
            name = f"{count:06d}-2008_00000{a}-2008_00000{b}:{category}"
            pair = {
                "src_imsize": [width, height, 3], "trg_imsize": [width, height, 3],
                "src_bndbox": boxes[a], "trg_bndbox": boxes[b],
                "src_kps": points[a], "trg_kps": points[b], "viewpoint_variation": count % 3,
            }  # fmt: skip
            write_json(root / "PairAnnotation" / "test" / f"{name}.json", pair)
    return root


def navi(root: Path, objects: int = 2, pictures: int = 5) -> Path:
    """NAVI: each object is one square of a plane, seen by cameras that roll, move and come nearer.

    ``pictures`` of each scene; focal length 40 pixels. Depth is exact to a tenth of a millimetre,
    and so are the matches that depth and pose give.
    """
    width, height = SIZE
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    for number in range(objects):
        for scene in ("multiview-00-pixel_5", "wild_set"):
            folder, annotations = root / f"object_{number}" / scene, []
            for index in range(pictures):
                angle, away = np.radians(25.0 * index + (scene == "wild_set")), 0.4 + 0.01 * index
                moved = np.array([0.01 * index - 0.02, 0.01 * number, away])
                seen = np.stack([(columns - width / 2) / 40, (rows - height / 2) / 40]) * away
                across, down = seen - moved[:2, None, None]
                x = np.cos(angle) * across + np.sin(angle) * down
                y = -np.sin(angle) * across + np.cos(angle) * down
                on = (abs(x) < 0.12) & (abs(y) < 0.12)
                pixels = np.where(on[..., None], texture(8 * x, 8 * y), np.uint8(0))
                save(folder / "images" / f"{index:03d}.jpg", pixels)
                inverse = np.where(on, round(655.35 / away), 0).astype(np.uint16)
                save(folder / "depth" / f"{index:03d}.png", inverse)
                camera = {
                    "q": [np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)],
                    "focal_length": 40.0,
                }
                camera["t"] = (1000 * moved).tolist()
                annotations.append({
                    "object_id": f"object_{number}", "filename": f"{index:03d}.jpg",
                    "image_size": [height, width], "camera": camera, "scene_name": scene,
                })  # fmt: skip
            write_json(folder / "annotations.json", annotations)
    return root


def navi_of_redwood(root: Path, source: Path) -> Path:
    """NAVI of real RGB-D frames of Redwood's format: one object, the frames in both its scenes.

    ``source`` has ``color/``, ``depth/`` in millimetres, ``camera_primesense.json`` and
    ``trajectory.log``, whose matrices lead from the camera to the world.
    """
    rotations = pytest.importorskip("scipy.spatial.transform").Rotation

    camera = json.loads((source / "camera_primesense.json").read_text())
    numbers = (source / "trajectory.log").read_text().split("\n")
    for scene in ("multiview-00-primesense", "wild_set"):
        folder, annotations = root / "room" / scene, []
        for index, picture in enumerate(sorted((source / "color").iterdir())):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "images" / picture.name).symlink_to(picture)
            depth = np.array(Image.open(source / "depth" / f"{picture.stem}.png")) / 1000
            inverse = np.divide(655.35, depth, out=np.zeros_like(depth), where=depth > 0)
            save(folder / "depth" / f"{picture.stem}.png", inverse.round().astype(np.uint16))
            rows = numbers[5 * index + 1 : 5 * index + 5]
            pose = np.linalg.inv(np.array([row.split() for row in rows], dtype=float))
            x, y, z, w = rotations.from_matrix(pose[:3, :3]).as_quat()
            annotations.append({
                "object_id": "room", "filename": picture.name, "scene_name": scene,
                "image_size": [camera["height"], camera["width"]],
                "camera": {
                    "q": [w, x, y, z], "t": (1000 * pose[:3, 3]).tolist(),
                    "focal_length": camera["intrinsic_matrix"][0],
                },
            })  # fmt: skip
        write_json(folder / "annotations.json", annotations)
    return root


def normals_of(numbers: np.ndarray) -> np.ndarray:
    """A normal for each number of a label map, as a PNG stores them, ``[H, W, 3]`` uint8."""
    vectors = np.random.default_rng(1).normal(size=(256, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ((vectors[numbers] + 1) / 2 * 255).round().astype(np.uint8)


def nyud(root: Path, train: int = 3, val: int = 2) -> Path:
    """ATRC's NYUDv2; colour, depth (1 m and 0.25 m a class) and normal follow from the class."""
    generator = np.random.default_rng(0)
    for split, first, count in (("train", 1, train), ("val", 501, val)):
        stems = [f"{number:04d}" for number in range(first, first + count)]
        for stem in stems:
            numbers = regions(generator, [0, 1, 2, 39, 40])
            save(root / "images" / f"{stem}.png", painted(numbers))
            save(root / "segmentation" / f"{stem}.png", numbers)
            save(root / "normals" / f"{stem}.png", normals_of(numbers))
            depth = np.where(numbers == 0, 0, 1 + 0.25 * numbers).astype(np.float32)
            (root / "depth").mkdir(exist_ok=True)
            np.save(root / "depth" / f"{stem}.npy", depth)
        write(root / "gt_sets" / f"{split}.txt", "\n".join(stems) + "\n")
    return root


def pascal_context(root: Path, train: int = 3, val: int = 3) -> Path:
    """ATRC's PASCALContext; every third picture has its segmentation in ``pascal-context/``.

    Shown are background, aeroplanes (1, salient, of no class of NYU's) and people (15, salient,
    heads in the left half and feet in the right); the second picture of a split has no person.
    """
    savemat = pytest.importorskip("scipy.io").savemat

    generator, width = np.random.default_rng(0), SIZE[0]
    for split, first, count in (("train", 0, train), ("val", 500, val)):
        stems = [f"2008_{number:06d}" for number in range(first, first + count)]
        for index, stem in enumerate(stems):
            numbers = regions(generator, [0, 1, 255] if index == 1 else [0, 1, 15, 255])
            person, left = numbers == 15, np.arange(width)[None] < width // 2
            parts = np.where(person, np.where(left, 1, 6), 0)
            save(root / "JPEGImages" / f"{stem}.jpg", painted(numbers + 20 * (parts == 6)))
            source = "pascal-context" if index == 2 else "VOC12"
            save(root / "semseg" / source / f"{stem}.png", numbers)
            salient = np.isin(numbers, (1, 15)).astype(np.uint8)
            save(root / "sal_distill" / f"{stem}.png", 255 * salient)
            save(root / "normals_distill" / f"{stem}.png", normals_of(numbers))
            for folder in ("human_parts", "pascal-context/trainval"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            context = np.where(numbers == 1, 2, np.where(person, 284, 158)).astype(np.uint16)
            savemat(root / "pascal-context" / "trainval" / f"{stem}.mat", {"LabelMap": context})
            plane = ("aeroplane", 1, (numbers == 1).astype(np.uint8), np.zeros((0, 0)))
            found = [("nose", person & left), ("rfoot", person & ~left)]
            kinds = [("part_name", object), ("mask", object)]
            pieces = np.array([(name, mask.astype(np.uint8)) for name, mask in found], dtype=kinds)
            human = ("person", 15, person.astype(np.uint8), pieces)
            kinds = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
            objects = np.array([plane] if index == 1 else [plane, human], dtype=kinds)
            annotation = {"anno": {"imname": stem, "objects": objects}}
            savemat(root / "human_parts" / f"{stem}.mat", annotation)
        write(root / "ImageSets" / "Context" / f"{split}.txt", "\n".join(stems) + "\n")
    return root


def nyu_depth(root: Path, train: int = 4, val: int = 3) -> Path:
    """BTS's NYU, the lists inside; depth follows from the colour, 0.5 m a class, 0 unknown."""
    generator = np.random.default_rng(0)
    for split, count, slash in (("train", train, "/"), ("test", val, "")):
        lines = []
        for number in range(count):
            scene = f"kitchen_{split}_{number % 2:04d}"
            numbers = regions(generator, [0, 1, 2, 3, 8])
            save(root / scene / f"rgb_{number:05d}.jpg", painted(numbers))
            save(root / scene / f"sync_depth_{number:05d}.png", (500 * numbers.astype(np.uint16)))
            files = [
                f"{slash}{scene}/{name}"
                for name in (f"rgb_{number:05d}.jpg", f"sync_depth_{number:05d}.png")
            ]
            lines.append(" ".join([*files, "518.8579"]))
        write(root / f"nyu_{split}.txt", "\n".join(lines) + "\n")
    return root


def redwood(root: Path, frames: int = 4) -> Path:
    """A sequence of Redwood's: a wall 0.6 m away, along which a camera moves and rolls."""
    width, height = SIZE
    columns, rows = np.meshgrid(np.arange(width) - 23.5, np.arange(height) - 19.5)
    trajectory = []
    for index in range(frames):
        angle, x, y = np.radians(15.0 * index), 0.02 * index, 0.01 * index
        cos, sin = np.cos(angle), np.sin(angle)
        across, down = 0.6 * columns / 40, 0.6 * rows / 40
        wall = texture(2 * (cos * across - sin * down + x), 2 * (sin * across + cos * down + y))
        save(root / "color" / f"{index:05d}.jpg", wall)
        save(root / "depth" / f"{index:05d}.png", np.full((height, width), 600, dtype=np.uint16))
        trajectory += [
            f"{index} {index} {index + 1}",
            f"{cos} {-sin} 0 {x}", f"{sin} {cos} 0 {y}", "0 0 1 0", "0 0 0 1",
        ]  # fmt: skip
    write(root / "trajectory.log", "\n".join(trajectory) + "\n")
    matrix = [40.0, 0, 0, 0, 40.0, 0, 23.5, 19.5, 1]
    write_json(root / "camera.json", {"width": width, "height": height, "intrinsic_matrix": matrix})
    return root


def sam(root: Path, width: int = 3) -> Path:
    """A tiny SAM with random weights, as transformers saves it: 64 px, 4 x 4 cells of ``width``."""
    import torch
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32}
    config = SamConfig(
        vision_config={
            "hidden_size": width, "num_attention_heads": 1, "num_hidden_layers": 1, "mlp_dim": 8,
            "image_size": 64, "patch_size": 16, "output_channels": 32, "num_pos_feats": 16,
            "global_attn_indexes": [0],
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config={**narrow, "num_hidden_layers": 1, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    model = SamModel(config)
    for weight in model.parameters():  # so large that boxes and pictures change the masks
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(root)
    return root
