"""GPU kernels in Triton: the place of the ``triton`` backend, which ScoreMachine does not offer yet."""
