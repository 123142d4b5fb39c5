"""Class activation maps judged by what the classifier says of the image that they leave over."""

from torch import Tensor


def average_drop(whole: Tensor, kept: Tensor) -> float:
    """Return A.D. = 100 · mean max(0, Y - O)/Y (Chattopadhay et al. 2018; FeatUp), in %.

    FeatUp's paper prints the sum without 1/N; its values are means.

    Args:
        whole: ``[N]`` Y, the class's probability on the whole image.
        kept: ``[N]`` O, on what the map leaves over.
    """
    whole, kept = whole.double(), kept.double()
    return 100 * ((whole - kept).clamp(min=0) / whole).mean().item()


def average_increase(whole: Tensor, kept: Tensor) -> float:
    """Return A.I., the share of images that the classifier is surer of without the rest, in %."""
    return 100 * (whole < kept).double().mean().item()
