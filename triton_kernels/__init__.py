"""GPU kernels in Triton: exact, truncated and top-k local posteriors.

A kernel family a file, each with its launcher. The kernels do not depend on databases or machines:
a launcher takes tensors, groups of pixels (:mod:`els.triton_kernels.pixel_groups`) and a
configuration.
"""
