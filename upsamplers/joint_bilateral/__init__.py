"""Joint-bilateral upsampling: features interpolated, then filtered by what an image shows.

Two functions (:mod:`.dispatch`) under one module (:mod:`.layer`), each in three implementations
that agree: ``reference``, ``folded`` (torch only) and ``triton_kernels``.
"""
