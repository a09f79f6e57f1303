"""GPU kernels in Triton: the place of a ``triton`` backend."""
