"""The compiled kernels; see :class:`els.engine.backends.native_kernels.Kernels`."""

from els.engine.backends.native_kernels import Kernels

_kernels: Kernels

LANES: int
instruction_sets = _kernels.instruction_sets
can_use_tiles = _kernels.can_use_tiles
posterior = _kernels.posterior
weigh = _kernels.weigh
sample_lists = _kernels.sample_lists
border = _kernels.border
