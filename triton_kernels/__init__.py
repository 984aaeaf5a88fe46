"""Triton kernels, one module per op; each needs triton, this package alone does not."""
