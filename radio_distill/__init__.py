"""Train RADIO-style agglomerative vision backbones from your own teachers and pictures."""

PROJECT = "radio-distill"
__version__ = "0.1.0"
