"""SAM on COCO with another encoder: does the map that imitates SAM's still drive SAM's decoder?

As RADIO and EfficientViT-SAM measure it: the decoder is frozen, each annotation's own box is the
prompt, of three masks the one counts that the decoder thinks best, and the score is the mean IoU.
The map is that of SAM's encoder before its neck, 1,280 channels in SAM-ViT-H; the neck comes with
the decoder. Left out: boxes that a detector finds.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.folder import spread
from ..errors import ConfigError
from ..types import Report, Score, Size, unheard
from .datasets.coco import Coco, CocoImage, CocoObject
from .demand import Demand, at_most
from .encoder import Encoder, open_image
from .examples import Show, ShownMaps
from .metrics.detection import mask_iou, mean_iou_by_area
from .protocol import protocol_of
from .shared import answers, scores_of

logger = logging.getLogger(__name__)

_MEAN = (0.485, 0.456, 0.406)
"""SAM's own; it pads with zeros once the mean is taken off."""
_BOXES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class SamCoco:
    """IoU of masks from ground-truth boxes on ``val2017``, crowds too, in four classes of area."""

    data: str
    decoder: str = ""
    """Folder of a SAM as transformers saves it (``SamModel``), such as facebook/sam-vit-huge."""
    head: str = "sam"
    """The student's head that imitates SAM; other encoders are asked for their map."""

    name: ClassVar[str] = "sam_coco"
    sources: ClassVar[dict[str, str]] = {"data": "data.coco"}

    def demand(self, parts: Mapping[str, int], limit: int | None = None) -> Demand:
        """Count the images, at the size that SAM was published for."""
        images = at_most(parts["val"], limit)
        return Demand(images=images, passes={(1024, 1024): images})

    def run(
        self,
        encoder: Encoder,
        limit: int | None = None,
        progress: Report = unheard,
        show: Show | None = None,
    ) -> list[Score]:
        """Score the annotations of the images that have some; ``limit`` thins out the images.

        An encoder whose map has not the width that the neck takes is passed over.

        Raises:
            ConfigError: no decoder is named, or the folder holds none.
        """
        objects: dict[CocoImage, list[CocoObject]] = {}
        for item in Coco(Path(self.data)).objects("val").objects:
            if item.area >= 1:
                objects.setdefault(item.image, []).append(item)
        decoder = load_decoder(self.decoder, encoder.device)
        images, fits = spread(list(objects), limit), True

        def ask(image: CocoImage, show: Show | None) -> list[float] | None:
            nonlocal fits
            found = self._ious(encoder, decoder, image, objects[image], show) if fits else None
            fits = found is not None
            return found

        ious = [iou for found in answers(images, ask, progress, show) for iou in found or ()]
        if not ious:
            return []
        areas = [item.area for image in images for item in objects[image]]
        protocol = protocol_of(
            replace(self, decoder=""), decoder=decoder.digest, images=len(images), masks=len(ious)
        )
        about = "Dense", len(images), ("iou",), protocol
        return scores_of(self.name, mean_iou_by_area(ious, areas), *about, masks=len(ious))

    def _ious(
        self,
        encoder: Encoder,
        decoder: "Decoder",
        image: CocoImage,
        items: Sequence[CocoObject],
        show: Show | None,
    ) -> list[float] | None:
        """Return the IoU of each annotation of an image; None for a map of another width."""
        opened = open_image(image.path)
        spatial = self._map(encoder, padded(opened, decoder.side))
        if spatial.shape[1] != decoder.width:
            logger.info(
                "sam_coco: the map of %s has %d channels and the decoder takes %d; passed over",
                encoder.name, spatial.shape[1], decoder.width,
            )  # fmt: skip
            return None
        masks = decoder(spatial, torch.tensor([_corners(item) for item in items]), opened.size)
        truth = torch.stack([item.mask() for item in items])
        if show is not None:
            pixels = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
            drawn = {"masks": numbered(truth, truth)}, {"masks": numbered(masks, truth)}
            show(ShownMaps(pixels, *drawn))
        ious: list[float] = mask_iou(masks, truth).tolist()
        return ious

    @torch.inference_mode()
    def _map(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        """Return the map ``[1, C, h, w]`` in SAM's own space, of the student's head if any."""
        if encoder.heads is None or self.head not in encoder.heads.targets:
            return encoder(pixels).spatial
        size = encoder.nearest_size((pixels.shape[-2], pixels.shape[-1]))
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        spatial = encoder.heads.predict(pixels.to(encoder.device))[self.head].spatial.float()
        normalizer = encoder.heads.targets[self.head].normalizer
        return spatial if normalizer is None else normalizer.invert(spatial)


class Decoder:
    """SAM's neck, prompt encoder and mask decoder, frozen.

    Args:
        sam: transformers' ``SamModel``; its image encoder is dropped.
        device: where it runs.
    """

    def __init__(self, sam: Any, device: torch.device | str = "cpu"):
        sam.vision_encoder.layers = nn.ModuleList()
        self.sam = sam.eval().requires_grad_(False).to(device)
        self.device = device
        self.side: int = sam.config.prompt_encoder_config.image_size
        """Of the padded image, in pixels."""
        self.grid: int = sam.config.prompt_encoder_config.image_embedding_size
        """Cells along a side of the map."""
        self.width: int = sam.config.vision_config.hidden_size
        """Channels of the map."""

    @property
    def digest(self) -> str:
        """Says which decoder it is."""
        digest = sha256()
        for name, value in sorted(self.sam.state_dict().items()):
            digest.update(name.encode() + value.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, spatial: Tensor, boxes: Tensor, size: Size) -> Tensor:
        """Return a mask for each box, ``[N, H, W]`` bool on the CPU.

        Args:
            spatial: ``[1, C, h, w]`` of the padded image, before the neck.
            boxes: ``[N, 4]`` left, top, right, bottom in pixels of the image.
            size: width and height of the image.
        """
        cells = (self.grid, self.grid)
        if tuple(spatial.shape[-2:]) != cells:
            spatial = F.interpolate(spatial, cells, mode="bilinear", antialias=True)
        embedding = self.sam.vision_encoder.neck(rearrange(spatial, "b c h w -> b h w c"))
        width, height = fitted(size, self.side)
        scale = torch.tensor([width / size[0], height / size[1]]).repeat(2)
        masks = []
        for some in (boxes * scale).to(self.device).split(_BOXES_AT_ONCE):
            output = self.sam(
                image_embeddings=embedding, input_boxes=some[None], multimask_output=True
            )
            best = output.iou_scores[0].argmax(dim=1)  # [n], of three
            logits = output.pred_masks[0, torch.arange(len(some)), best][:, None]
            whole = F.interpolate(logits, (self.side, self.side), mode="bilinear")
            shown = whole[:, :, :height, :width]
            masks.append(F.interpolate(shown, (size[1], size[0]), mode="bilinear")[:, 0] > 0)
        return torch.cat(masks).cpu()


def load_decoder(folder: str, device: torch.device | str = "cpu") -> Decoder:
    """Read a SAM from a local folder; nothing is downloaded.

    Raises:
        ConfigError: there is none, in one line.
    """
    field = "evaluation.options.sam_coco.decoder"
    if not folder:
        raise ConfigError(f"{field} is empty; name a folder with transformers' SamModel in it")
    path = Path(folder).expanduser()
    try:
        kind = json.loads((path / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{field}: no config.json of a model in {path}") from error
    if kind != "sam":
        raise ConfigError(f"{field}: {path} holds a model of type {kind!r}, not 'sam'")
    try:
        from transformers import SamModel
    except ImportError as error:
        raise ConfigError("sam_coco needs transformers; pip install 'radio-distill[hf]'") from error
    try:
        sam, report = SamModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # what safetensors and transformers raise has no common base
        raise ConfigError(f"{field}: {path}: {str(error).splitlines()[0]}") from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{field}: {path} lacks {len(missing)} weights (first: {missing[0]})")
    return Decoder(sam, device)


def fitted(size: Size, side: int) -> Size:
    """Return (width, height) of an image of such a size once its longer side is ``side``."""
    scale = side / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def padded(image: Image.Image, side: int) -> Tensor:
    """Resize the longer side and pad to a square, right or below: ``[1, 3, side, side]``."""
    small = image.resize(fitted(image.size, side), Image.Resampling.BILINEAR)
    pixels = rearrange(torch.tensor(_MEAN), "c -> c 1 1").repeat(1, side, side)
    shown = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
    pixels[:, : shown.shape[1], : shown.shape[2]] = shown
    return pixels[None]


def numbered(masks: Tensor, truth: Tensor) -> Tensor:
    """Return the numbers, from 1, of the masks ``[N, H, W]`` as a map, 0 for none.

    Of several in one place it is the one that is smallest in ``truth``.
    """
    numbers = torch.zeros(masks.shape[1:], dtype=torch.long)
    for index in truth.sum(dim=(1, 2)).argsort(descending=True).tolist():
        numbers[masks[index]] = index + 1
    return numbers


def _corners(item: CocoObject) -> list[float]:
    left, top, width, height = item.box
    return [left, top, left + width, top + height]
