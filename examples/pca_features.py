# %% [markdown]
# # Features of a student as colours
#
# Three principal components of the student's features become red, green and blue. One basis serves
# every resolution, so equal colours mean equal features: a student whose colours change from one
# size to the next sees other things there. Open this file as a notebook (Jupytext, VS Code), or run
# `python examples/pca_features.py runs/demo photo.jpg`.

# %%
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # take this line out in a notebook
import matplotlib.pyplot as plt
import torch
from torchvision.io import decode_image
from torchvision.transforms.functional import resize

import radio_distill

STUDENT, PHOTOGRAPH = sys.argv[1:3] if len(sys.argv) > 2 else ("runs/demo", "photo.jpg")
SIDES = (224, 448, 672)  # shorter side of the image, in pixels

# %% [markdown]
# The student takes any size; a cell of its map is as many pixels as in training.

# %%
model = radio_distill.load(STUDENT, heads=[])
image = decode_image(PHOTOGRAPH, mode="RGB") / 255  # [3, H, W]
maps = []
for side in SIDES:
    pixels = resize(image[None], [side], antialias=True).clamp(0, 1)
    with torch.inference_mode():
        maps.append(model(pixels).features[0])  # [D, h, w]
print([list(features.shape) for features in maps])

# %% [markdown]
# One basis for all maps, each of which weighs alike whatever its number of cells.

# %%
tokens = [features.flatten(1).T for features in maps]  # [h w, D]
mean = torch.stack([rows.mean(0) for rows in tokens]).mean(0)
covariance = sum((rows - mean).T @ (rows - mean) / len(rows) for rows in tokens)
components = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)  # [D, 3]
values = torch.cat([(rows - mean) @ components for rows in tokens])
low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)

# %%
figure, axes = plt.subplots(1, 1 + len(maps), figsize=(4 * (1 + len(maps)), 4))
axes[0].imshow(image.permute(1, 2, 0))
for axis, features, side in zip(axes[1:], maps, SIDES, strict=True):
    colours = (features.permute(1, 2, 0) - mean) @ components  # [h, w, 3]
    axis.imshow(((colours - low) / (high - low)).clamp(0, 1))
    axis.set_title(f"{side} px")
for axis in axes:
    axis.axis("off")
figure.savefig("pca_features.png", bbox_inches="tight")
print(Path("pca_features.png").resolve())
