"""Balance between teachers: their features brought to one scale before they are compared."""

from ..registry import Registry

NORMALIZERS = Registry(
    "normalizer",
    {
        "phi_s": "radio_distill.normalize.phi_s:PhiS",
        "none": "radio_distill.normalize.normalizers:Identity",
        "layer_norm": "radio_distill.normalize.normalizers:LayerNorm",
        "global_standardise": "radio_distill.normalize.normalizers:GlobalStandardise",
        "per_channel_standardise": "radio_distill.normalize.normalizers:PerChannelStandardise",
        "ema_standardise": "radio_distill.normalize.moving:EmaStandardise",
        "batch_standardise": "radio_distill.normalize.moving:BatchStandardise",
    },
)
