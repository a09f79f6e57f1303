"""The compiled kernels of another instruction set; see ``_native_baseline``."""

from els.engine._native_baseline import LANES as LANES
from els.engine._native_baseline import border as border
from els.engine._native_baseline import can_use_tiles as can_use_tiles
from els.engine._native_baseline import instruction_sets as instruction_sets
from els.engine._native_baseline import posterior as posterior
from els.engine._native_baseline import sample_lists as sample_lists
from els.engine._native_baseline import weigh as weigh
