"""Put a trained student into a LLaVA, a vision-language model of transformers.

    radio-distill export runs/demo --format transformers --output exported
    python examples/llava.py exported /models/Qwen2.5-7B-Instruct llava --size 432

The folder that is written holds student, language model and an untrained projector between them.
The language model gets the patches alone, as VILA and RADIO have it: transformers' own LLaVA can
drop no more than the first token of its encoder, and a RadioModel has several summary and register
tokens. So whoever reads the folder imports this file first; docs/vlm.md has training and scoring.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    RadioConfig,
    RadioModel,
)

IMAGE_TOKEN = "<image>"


class PatchesConfig(RadioConfig):
    """Configuration of a student whose patches alone are shown."""

    model_type = "radio_patches"


class Patches(RadioModel):
    """A RadioModel whose hidden states are those of its patches."""

    config_class = PatchesConfig

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Encode images ``[B, 3, H, W]`` in [0, 1]; hidden states are ``[B, h * w, D]``."""
        output = super().forward(pixel_values, **kwargs)
        if output.hidden_states is not None:
            # Layers that nobody asked for are None.
            output.hidden_states = tuple(
                layer if layer is None else layer[:, self.config.num_summary_tokens :]
                for layer in output.hidden_states
            )
        return output


AutoConfig.register(PatchesConfig.model_type, PatchesConfig)
AutoModel.register(PatchesConfig, Patches)


def build(student: Path, language_model: Path, size: int) -> tuple[Any, LlavaProcessor]:
    """Return a LLaVA of two folders, its projector untrained, and its processor.

    Args:
        student: what `radio-distill export --format transformers` wrote.
        language_model: a causal model of transformers, with its tokenizer.
        size: side of the square image that the student sees, in pixels; whole patches.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language = AutoModelForCausalLM.from_pretrained(language_model)
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer))
    radio = RadioModel.from_pretrained(student)
    tower = Patches(
        PatchesConfig.from_dict(radio.config.to_dict() | {"model_type": "radio_patches"})
    )
    tower.load_state_dict(radio.state_dict())
    if size % tower.patch_size:
        raise SystemExit(f"--size {size} is no multiple of the patch, {tower.patch_size} pixels")
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(size // tower.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",  # of the patches
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"height": size, "width": size},
            do_center_crop=False,
            do_normalize=False,  # the student does it
        ),
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
    )
    return model, processor


def only_projector(model: Any) -> None:
    """Leave the projector trainable and nothing else: LLaVA's first stage."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)


def main(argv: list[str] | None = None) -> None:
    """Build a LLaVA, save it, and read it back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", type=Path, help="folder of an export in transformers' format")
    parser.add_argument("language_model", type=Path, help="folder of a causal language model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=432, help="side of the image, in pixels")
    arguments = parser.parse_args(argv)
    model, processor = build(arguments.student, arguments.language_model, arguments.size)
    # Under the names of this class: published names are understood of a RadioModel only.
    model.save_pretrained(arguments.output, save_original_format=False)
    processor.save_pretrained(arguments.output)
    LlavaForConditionalGeneration.from_pretrained(arguments.output)
    tokens = model.config.image_seq_length
    print(f"{arguments.output}: {tokens} tokens an image of {arguments.size} pixels a side")


if __name__ == "__main__":
    main()
