"""What ``options.summary`` chooses of a model's tokens and of what it pools, in each library."""

import torch
from torch import Tensor

from radio_distill.errors import ConfigError

SUMMARY_OPTION = "token (class token), pool (the model's), token_and_mean (of patches), or none"


def summary_of(
    choice: str,
    kind: str,
    *,
    token: Tensor | None,
    pooled: Tensor | None,
    patches: Tensor,
) -> Tensor | None:
    """Return the summary ``[B, S]``, or None for ``none``.

    Args:
        choice: one of :data:`teachers.options.SUMMARIES`.
        kind: the model, for a message.
        token: class token ``[B, C]``, of a model that has one.
        pooled: what the model itself pools ``[B, P]``, where it does.
        patches: tokens ``[B, N, C]`` of the patches; read for ``token_and_mean`` alone.

    Raises:
        ConfigError: the model has no class token, or pools nothing.
    """
    if choice == "none":
        return None
    if choice == "pool":
        if pooled is None:
            raise ConfigError(f"options.summary: pool: {kind} pools nothing; leave it out")
        return pooled
    if token is None:
        raise ConfigError(f"options.summary: {choice}: {kind} has no class token; leave it out")
    return token if choice == "token" else torch.cat([token, patches.mean(1)], dim=1)
