"""Which index a dataset needs, and how much memory that takes."""

import math
from collections.abc import Iterator

from els.index.patches.rows import BUILD_CHUNK_PATCHES

_FLAT_MOST = 1 << 17
REDUCED_MOST = 64
_REDUCED_SHARE = 0.75
_LISTS_MOST = 1 << 16
# Training patches for each list.
PATCHES_PER_LIST = 64
# Distinct patches for each list, at least: k-means averages them.
LEAST_PATCHES_PER_LIST = 32
# Number of lists from which an HNSW graph finds the nearest.
_HNSW_FROM = 4096
# Links of a node of that graph.
_HNSW_LINKS = 32
# Bytes on disk for each patch beside its code: address, centre, and shares of centroids and graph.
BESIDE_CODES = 20
# Processor time to index a patch: 8 to 24 microseconds for 2,000 to 20,000 images, P = 3 to 9,
# colour or not (AMD EPYC, AVX-512), 21 for 50,000 colour images, P = 3 (AMD EPYC, AVX2), most of it
# to find its list.
_PATCH_SECONDS = 20e-6
# The same for all patches of a Flat index.
_FLAT_SECONDS = 1.0
# Bytes of a vector: FAISS reads codes of whole vectors several times as fast as others.
LANES = 8
# Multiple of bytes for which FAISS, with SQ8_direct, would round queries to bytes.
ROUNDING_LANES = 16


def choose_factory(
    count: int, dimension: int, *, distinct: int, reduced: int, memory: int = 4 * 10**9
) -> str:
    """Chooses the FAISS factory string of an index.

    - Up to 2^17 patches ``Flat``: exact, and as fast as anything at that size.
    - Then inverted lists (IVF), about ``8 sqrt(count)`` of them: many short ones, because a
      low-dimensional search that probes 32 short lists finds more per code scanned than one that
      probes 4 long ones. At most 2^16 and at most ``2^20 / dimension``, since the cost of
      k-means grows with both, and at most one for 32 distinct patches, so that k-means has
      something to average.
    - From 4,096 lists on the nearest are found by an HNSW graph: finding them by brute force
      would cost more than scanning them.
    - Up to 64 dimensions ``SQ8_direct``: one byte per pixel, which is what a pixel is, so that
      nothing is lost; smaller and faster than floats. Zeros fill the code up to an odd multiple
      of 8 bytes (``Pad``): FAISS reads such codes with whole vectors, two to three times as fast.
    - Above, PCA first where that drops a quarter of the components, since neighbouring pixels say
      much the same, then one byte (``SQ8``) per component; else again all pixels. Codes must
      determine the weight of a patch, not only which are near: what PCA drops is noise in every
      logit. If that exceeds the memory, the first 64 components, then product codes (``PQ``) of 2,
      4 or 8 components per byte: the fewest that fit.

    Args:
        count: number of patches.
        dimension: C * P * P.
        distinct: number of distinct patches to train on.
        reduced: components that explain 99.95 % of the variance.
        memory: bytes that the build may take, the index in memory included.

    Returns:
        The factory string.

    Raises:
        ValueError: not even the smallest fits `memory`.
    """
    if count <= _FLAT_MOST and 2 * count * (4 * dimension + 8) <= memory:
        return "Flat"
    smallest = 0
    for prefix, components, code, code_bytes in _code_choices(dimension, reduced, distinct):
        lists = choose_lists(count, components, distinct)
        graph = f"_HNSW{_HNSW_LINKS}" if lists >= _HNSW_FROM else ""
        smallest = needed_bytes(count, dimension, components, lists, code_bytes)
        if code.startswith("PQ"):
            # FAISS makes tables of 256 floats per list and byte, if they fit into 2 GB.
            smallest += min(lists * code_bytes << 10, 1 << 31)
        if smallest <= memory:
            return f"{prefix}IVF{lists}{graph},{code}"
    raise ValueError(
        f"an index of {count:,} patches of dimension {dimension} needs at least {smallest:,} bytes "
        f"of memory, allowed are {memory:,}; allow more (--memory {math.ceil(smallest / 1e9)}GB), "
        "or build the database from fewer images"
    )


def _code_choices(
    dimension: int, reduced: int, distinct: int
) -> Iterator[tuple[str, int, str, int]]:
    """(prefix, components, code, bytes per code), from the best to the smallest."""
    # PCA and PQ (256 centroids a byte) cannot be trained on fewer.
    trainable = distinct >= max(256, dimension)
    components = math.ceil(reduced / 8) * 8
    if dimension <= REDUCED_MOST or not trainable or components > _REDUCED_SHARE * dimension:
        padded = _padded(dimension)
        prefix = "" if padded == dimension else f"Pad{padded},"
        yield prefix, dimension, "SQ8_direct", padded
    elif components > REDUCED_MOST:
        yield f"PCA{components},", components, "SQ8", components
    if not trainable:
        return
    components = min(components, REDUCED_MOST)
    if components > dimension:
        components = 8
    if components > dimension:
        return
    prefix = f"PCA{components},"
    if dimension > REDUCED_MOST:
        yield prefix, components, "SQ8", components
    for per_byte in (2, 4, 8):
        yield prefix, components, f"PQ{components // per_byte}", components // per_byte


def _padded(dimension: int) -> int:
    """Bytes of an ``SQ8_direct`` code: an odd number of eights, or unchanged if that is short."""
    if dimension <= 2 * LANES:
        return dimension
    eights = math.ceil(dimension / LANES)
    return LANES * (eights + (eights + 1) % 2)


def build_cost(count: int, dimension: int, threads: int) -> tuple[float, int]:
    """About how many seconds the build of an index takes, and bytes that it has at most on disk.

    Args:
        count: number of patches.
        dimension: C * P * P.
        threads: that work on it, each on a core.
    """
    if count <= _FLAT_MOST:
        return _FLAT_SECONDS, count * (4 * dimension + BESIDE_CODES)
    return count * _PATCH_SECONDS / threads, count * (_padded(dimension) + BESIDE_CODES)


def choose_lists(count: int, components: int, distinct: int) -> int:
    """The number of inverted lists for a number of patches, a power of two."""
    wanted = 2 ** round(math.log2(8 * math.sqrt(count)))
    bounds = (_LISTS_MOST, (1 << 20) // components, max(1, distinct // LEAST_PATCHES_PER_LIST))
    return int(min(wanted, 2 ** int(math.log2(min(bounds)))))


def needed_bytes(count: int, dimension: int, components: int, lists: int, code_bytes: int) -> int:
    """Memory of the build at its peak: merging, or training if that takes more."""
    # Lists grow while they are merged; a list's capacity is up to twice its length.
    merging = round(1.4 * count * (code_bytes + 8)) + BUILD_CHUNK_PATCHES * (code_bytes + 8)
    sample = min(count, PATCHES_PER_LIST * lists)
    training = sample * 5 * dimension + sample * 4 * components
    links = 4 * (2 * _HNSW_LINKS + 8)
    return max(merging, training) + lists * (4 * components + links) + (1 << 28)
