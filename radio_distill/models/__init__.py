"""Students and their heads."""

from ..registry import Registry

HEADS = Registry(
    "head",
    {
        "mlp": "radio_distill.models.projectors:MLPHead",
        "ln_mlp": "radio_distill.models.projectors:LNMLPHead",
        "linear": "radio_distill.models.projectors:LinearHead",
        "identity": "radio_distill.models.projectors:IdentityHead",
    },
)
