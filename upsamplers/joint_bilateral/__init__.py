"""Joint-bilateral upsampling: features interpolated, then filtered by what an image shows.

Two functions (:mod:`.dispatch`) under one module (:mod:`.layer`), each in three implementations
that agree: ``reference``, ``folded`` (torch only) and ``triton_kernels``.
"""

from .dispatch import apply_kernel, joint_bilateral, range_weights
from .layer import JointBilateralLevel, JointBilateralStack, prime_factors

__all__ = [
    "JointBilateralLevel",
    "JointBilateralStack",
    "apply_kernel",
    "joint_bilateral",
    "prime_factors",
    "range_weights",
]
