"""What the blocks of a student are, in the terms of the formats that rebuild them from numbers.

Only plain pre-norm blocks can be described so: LayerNorm, attention of full width, an MLP. All
else in timm's vision transformers (norms of queries and keys, RMSNorm, parallel or post-norm
blocks, a norm before the blocks) is refused by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ..errors import ExportError
from ..models.student import Student
from .folded import FoldedStudent

ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
"""timm's activation layers, by their names in transformers."""


@dataclass(frozen=True)
class BlockShape:
    """One block of a student; all blocks are alike."""

    heads: int
    mlp_hidden: int
    """Channels inside the MLP, behind the gate where it has one."""
    activation: str
    """Name of the activation in transformers."""
    eps: float
    """Of the norms."""
    qkv_bias: bool
    layer_scale: bool
    gated: bool
    """Whether the MLP is a SwiGLU."""


def block_shape(student: FoldedStudent, format_name: str) -> BlockShape:
    """Describe the blocks of a student.

    Raises:
        ExportError: naming what is not plain about them.
    """
    body = student.vit
    oddity = next(_oddities(body), None)
    if oddity is not None:
        raise ExportError(
            f"{format_name} cannot hold student.architecture {student.config.architecture!r}: "
            f"{oddity}; export it as onnx"
        )
    block: Any = body.blocks[0]
    return BlockShape(
        heads=block.attn.num_heads,
        mlp_hidden=block.mlp.fc2.in_features,
        activation=ACTIVATIONS[type(block.mlp.act).__name__],
        eps=block.norm1.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        gated=_is_gated(block.mlp),
    )


def _oddities(body: Student) -> Iterator[str]:
    """Yield what a :class:`BlockShape` has no word for."""
    from timm.layers import Attention, LayerNorm
    from timm.models.vision_transformer import Block

    if not isinstance(body.norm_pre, nn.Identity):
        yield "it has a norm before its blocks (norm_pre)"
    blocks: list[Any] = list(body.blocks)
    for block in blocks:
        if type(block) is not Block:
            yield f"its blocks are {type(block).__name__}, not the plain Block"
            return
        attention, mlp = block.attn, block.mlp
        norms = {type(block.norm1), type(block.norm2)}
        if not norms <= {LayerNorm, nn.LayerNorm}:
            yield f"its norms are {norms.pop().__name__}, not LayerNorm"
        width = attention.num_heads * attention.head_dim
        if type(attention) is not Attention or width != body.embed_dim:
            yield f"its attention is {type(attention).__name__} of width {width}"
        if not isinstance(attention.q_norm, nn.Identity):
            yield "its queries and keys are normalised (qk_norm)"
        if getattr(attention, "gate", None) is not None:
            yield "its attention is gated"
        if not (isinstance(attention.norm, nn.Identity) and isinstance(mlp.norm, nn.Identity)):
            yield "it has norms inside attention and MLP (scale_attn_norm, scale_mlp_norm)"
        if attention.proj.bias is None:
            yield "its projections have no bias (proj_bias)"
        if not (_is_gated(mlp) or _is_plain(mlp)):
            yield f"its MLP is {type(mlp).__name__} with {type(mlp.act).__name__}"


def _is_plain(mlp: nn.Module) -> bool:
    from timm.layers import Mlp

    return type(mlp) is Mlp and type(mlp.act).__name__ in ACTIVATIONS


def _is_gated(mlp: Any) -> bool:
    """Whether it is a SwiGLU whose first half is the gate, as DINOv2's giant has it."""
    from timm.layers import GluMlp

    return type(mlp) is GluMlp and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last


def body_tensors(body: Student) -> dict[str, Tensor]:
    """Return a student's tensors under the names of RADIO's checkpoints, without their prefix.

    Those of the blocks are timm's; LayerScale is ``blocks.N.ls1.gamma`` still, for which every
    format has another name.
    """
    table = body.positions.table
    return {
        "patch_generator.embedder.weight": body.patch_embedding.weight,  # [D, 3 * patch**2]
        "patch_generator.pos_embed": rearrange(table, "y x d -> 1 (y x) d"),
        "patch_generator.cls_token.token": body.prefix_tokens,  # summary tokens, then registers
        **{f"blocks.{key}": value for key, value in body.blocks.state_dict().items()},
    }
