"""Every fitted number of the approximations, one a line (docs/theory.md, docs/performance.md).

Costs are in pairs of a pixel and a candidate of the exact kernel, or in images of it; they are
fixed, so that what is chosen depends on the input and not on how busy the machine is. What a
backend's own work costs is a :class:`~els.engine.backends.backend.Costs`. Unless another source is
given, a number was chosen by hand from measurements of a few held-out images of Fashion-MNIST and
CIFAR-10.
"""

from __future__ import annotations

# Random subsets.

# Groups of images whose spread is the standard error (jackknife).
GROUPS = 16
# Images of the first subset of mode="auto".
FIRST_IMAGES = 256
# Pairs below which everything is computed at once. Two cores weigh 2 to 5 * 10^9 a second; what
# subsets take beside their pairs is 20 to 30 ms for images of 28 x 28 or 32 x 32 pixels.
LEAST_PAIRS = 2e9
# The same on a GPU: an H100 weighs up to 1.7 * 10^12 pairs a second, and a subset takes some 40 ms.
LEAST_GPU_PAIRS = 5e11
# Pairs that loading an image takes for each of its pixels, from the time of LS.
LOADED_IMAGE = 8
# Largest growth of a sample before its error is measured again.
LARGEST_GROWTH = 8.0
# Least growth that is worth another step.
LEAST_GROWTH = 1.5
# Share of what there is beyond which a sample becomes everything, which costs little more.
LARGEST_SHARE = 0.6

# Heads: the nearest patches, by an index.

# Largest query over alpha: beyond, float32 squares of up to 10^4 components would overflow, and an
# index could not tell patches apart.
LARGEST_QUERY = 1e15
# Rounding of an index's squared distances, as a share of the squared norms (float32, FAISS).
INDEX_ROUNDING = 4e-6
# Share of a group's mass below which its float32 sums do not know what a head leaves of it.
CANCELLATION = 1e-5
# Natural logarithm of the most by which a candidate may seem heavier than its group's reference.
LARGEST_EXCESS = 50.0

# Lists: a sample of all patches of an index.

# Least share of the codes: 1.5 times the least inclusion probability.
LEAST_SHARE = 1.5 * 2.0**-10
# Largest share that is read at first.
LARGEST_FIRST_SHARE = 1 / 32
# Effective blocks from which their spread is known.
LEAST_BLOCKS = 8.0

# All methods.

# Share of the tolerance that is aimed at: a measured error is itself uncertain.
MARGIN = 0.9
# Safety factor of the standard errors of subsets and lists: a spread contains nothing of heavy
# patches that were not read. Fitted by python -m els.bench.safety (bench/results/safety.json).
SAFETY = 1.3
# Largest difference of two clean pixels.
RANGE = 2.0
