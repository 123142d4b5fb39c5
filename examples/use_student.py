"""Describe photographs with a trained student, and say which are alike.

    python examples/use_student.py runs/demo photo.jpg other.jpg
    python examples/use_student.py runs/demo photo.jpg --head dino --output features.safetensors

The first argument is whatever `radio_distill.load` takes: a run, a stage, a checkpoint, an export
in transformers' format, or the folder of a published RADIO model.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

import radio_distill
from radio_distill.evals.encoder import open_image


def main(argv: list[str] | None = None) -> None:
    """Encode each photograph at its own size, one by one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", help="run, checkpoint or exported folder")
    parser.add_argument("photographs", nargs="+", type=Path)
    parser.add_argument("--head", help="a teacher, for features in its space")
    parser.add_argument("--output", type=Path, help="file for all features")
    arguments = parser.parse_args(argv)
    heads = [arguments.head] if arguments.head else []
    model = radio_distill.load(arguments.student, heads=heads)

    features, summaries = {}, []
    for path in arguments.photographs:
        pixels = to_tensor(open_image(path))[None]  # [1, 3, H, W] in [0, 1], upright
        with torch.inference_mode():
            output = model(pixels, heads=heads)
        spatial = output.heads[arguments.head].spatial if heads else output.features
        print(f"{path}: summary {list(output.summary.shape)}, features {list(spatial.shape)}")
        features[path.name] = spatial[0].contiguous()  # [C, h, w]
        summaries.append(output.summary)

    alike = torch.nn.functional.normalize(torch.cat(summaries), dim=1)  # [B, S]
    for row, path in zip(alike @ alike.T, arguments.photographs, strict=True):
        print(f"{path.name}: " + "  ".join(f"{value:.3f}" for value in row.tolist()))
    if arguments.output:
        save_file(features, arguments.output)


if __name__ == "__main__":
    main()
