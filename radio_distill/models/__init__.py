"""Students and their heads."""

from ..registry import Registry

HEADS = Registry(
    "head",
    {
        "mlp": "radio_distill.models.projectors:MLPHead",
        "ln_mlp": "radio_distill.models.projectors:LNMLPHead",
        "attention": "radio_distill.models.projectors:AttentionHead",
        "ladder": "radio_distill.models.projectors:LadderHead",
        "conv": "radio_distill.models.projectors:ConvHead",
        "linear": "radio_distill.models.projectors:LinearHead",
        "identity": "radio_distill.models.projectors:IdentityHead",
    },
)
