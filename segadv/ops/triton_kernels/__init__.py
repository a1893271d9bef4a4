"""The Triton kernels, one file per group of operations, as in csrc/cpu/."""
