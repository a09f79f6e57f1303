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
PILOT_IMAGES = 256
# Pairs below which everything is computed at once. Two cores weigh 10^9 a second; what subsets take
# beside their pairs is some 15 ms for images of 28 x 28 pixels.
LEAST_PAIRS = 4e8
# The same on a GPU: an H100 weighs up to 1.7 * 10^12 pairs a second, and a subset takes some 40 ms.
LEAST_GPU_PAIRS = 5e11
# Pairs that loading an image takes for each of its pixels, from the time of LS.
LOADED_IMAGE = 8
# Images of the first subset of border pixels, at most, where products on a matrix unit weigh it.
BORDER_IMAGES = 2048
# Exponent with which the error of a subset falls with its size at first, without a head.
SUBSET_POWER = 0.35
# The same beside a head, which holds the heaviest patches.
HEAD_POWER = 0.45
# Exponent with which the error of border pixels falls with the size of their subset.
BORDER_POWER = 0.35
# Least exponent that is taken from the fall of an error between two subsets.
LEAST_POWER = 0.2
# Largest exponent: that of independent draws.
LARGEST_POWER = 0.5
# Largest growth of a subset before its error is measured again.
LARGEST_GROWTH = 4
# Share of the images beyond which a subset is not worth its error: everything costs little more.
LARGEST_SHARE = 0.6
# Share of the images beyond which the subset of a border pixel becomes all of them.
NEARLY_ALL = 2 / 3

# Heads: the nearest patches, by an index.

# Pixels that a head is tried on.
PILOT_PIXELS = 32
# Inverted lists that a search may probe. The fewest suffice where the subset does the work, the
# most where few patches matter and they must be found.
EFFORTS = (4, 16, 32, 64)
# Pairs that searching a code costs, whatever its size.
SEARCHED_CODE = 9.0
# Pairs that a byte of it costs beside.
SEARCHED_BYTE = 1 / 3
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

# Exponent with which the error falls with the share of the codes that is read.
LIST_POWER = 0.8
# Least growth of a pixel's share when it is read anew: each time costs the ranking of all lists.
LEAST_LIST_GROWTH = 1.5
# Largest growth: the error tells no more.
LARGEST_LIST_GROWTH = 8.0
# Costs of lists, in first subsets, below which no first subset is drawn before them.
CHEAP_LISTS = 6
# Images that tell whether few patches share a pixel, where probing as many lists as a search costs
# more than these.
LOOK_IMAGES = 64
# Effective number of patches above which an estimate depends on no particular patch.
MANY_PATCHES = 8.0
# Share of the codes that suffices where many patches share a pixel: 1 / 256 at this code size,
SHARE_CODE_BYTES = 64
# growing with this power of the size,
SHARE_CODE_POWER = 1.5
# from that share
SHARE_OF_SMALL_CODES = 1 / 256
# up to this one.
LARGEST_FIRST_SHARE = 1 / 32
# Least share of the codes: 1.5 times the least inclusion probability.
LEAST_SHARE = 1.5 * 2.0**-10
# Safety factor of the standard error where codes are not whole patches (docs/performance.md).
LIST_SAFETY_REDUCED = 1.25
# Where they are, it is 1 + this / (1 + (n / LIST_SAFETY_PATCHES)^LIST_SAFETY_POWER) for n effective
# patches (docs/performance.md).
LIST_SAFETY = 3.0
# Effective patches at which it has fallen by half.
LIST_SAFETY_PATCHES = 60.0
# Power with which it falls.
LIST_SAFETY_POWER = 0.4

# All methods.

# Share of the tolerance that is aimed at: a measured error is itself uncertain.
MARGIN = 0.9
# Safety factor of a pixel's standard error with many effective patches in its subset; with n it is
# this + SUBSET_SAFETY_FEW / (1 + n / SUBSET_SAFETY_PATCHES) (docs/performance.md).
SUBSET_SAFETY = 1.08
# What it is larger with few.
SUBSET_SAFETY_FEW = 0.3
# Effective patches at which that has fallen by half.
SUBSET_SAFETY_PATCHES = 400.0
# Share of its aim that a step of the border aims at: another step costs as much.
BORDER_MARGIN = 0.95
# Largest difference of two clean pixels.
RANGE = 2.0
# Prices of an error that are tried when work is allotted to pixels,
PRICES = 24
# each so many times the one before.
PRICE_STEP = 0.5
