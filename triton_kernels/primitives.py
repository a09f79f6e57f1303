"""The parts of the kernels; each is one line of the mathematics.

Distances are in units of log2: ``D = log2(e) / (2 sigma^2) * ||x_patch - alpha k_patch||^2``, so
the logit to base 2 is -D. They are *biased*: every squared difference starts from minus what true
noise contributes, so that the sums of the candidates that matter stay near zero, where rounding is
least; a window has as many terms for all candidates of a pixel, so the bias drops out of the
weights.
"""

import triton
import triton.language as tl

from els.triton_kernels import tiles

# Finite, yet below every logit: exp2 of it is 0, and differences of it are not nan. In float32:
LOWEST = tl.constexpr(-1e30)
# In float64, where distances are not cut and sigma may be tiny:
LOWEST_FLOAT64 = tl.constexpr(-1e300)
# Squares above this are cut: float16 ends at 65504. A candidate so far has no weight.
HIGHEST = tl.constexpr(30000.0)
# The plan counts on the same number.
RESIDENT_CHUNKS = tl.constexpr(tiles.RESIDENT_CHUNKS)


@triton.jit
def exponents(logits, reference, PRECISE: tl.constexpr):
    """``logits - reference`` as float32, of which a logit_sum can be summed.

    ``PRECISE``: of float64 logits, whose differences may be beyond float32; those weigh nothing.
    """
    difference = logits - reference
    if PRECISE:
        difference = tl.maximum(difference, LOWEST)
    return difference.to(tl.float32)


@triton.jit
def clean_values(packed, C: tl.constexpr):
    """The C bytes of pixels as floats, channels 1 and 3 times 256 (see ``channel_scale``).

    The byte becomes the mantissa of 2^23 + v, which costs a logical operation and an addition; a
    conversion instruction would run at an eighth of their rate.
    """
    wide = packed.to(tl.uint32, bitcast=True)
    values = ()
    for c in tl.static_range(C):
        bits = ((wide >> (16 * (c // 2))) & (0xFF << (8 * (c % 2)))) | 0x4B000000
        values = values + (bits.to(tl.float32, bitcast=True) - 8388608.0,)
    return values


@triton.jit
def channel_scale(c: tl.constexpr):
    """What a value of ``clean_values`` must be multiplied with to be a byte."""
    return 1.0 if c % 2 == 0 else 1.0 / 256.0


@triton.jit
def load_channels(pointer, STRIDE: tl.constexpr, C: tl.constexpr):
    """The C planes of a tile of the noisy image."""
    planes = ()
    for c in tl.static_range(C):
        planes = planes + (tl.load(pointer + c * STRIDE),)
    return planes


@triton.jit
def squared_difference(query, clean, slope, bias, C: tl.constexpr):
    """``sum_c (query_c - slope * clean_c)^2 - bias`` per pixel, in the dtype of the query."""
    total = -bias
    for c in tl.static_range(C):
        value = clean[c].to(query[c].dtype)
        difference = query[c] - (slope * channel_scale(c)) * value
        total = difference * difference + total
    return total


@triton.jit
def split(values):
    """Two float16 whose sum has 22 of the value's 24 bits; ``values`` at most 65504."""
    # Cut, not rounded: one logical operation, and what is left over is exact.
    high = (values.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high.to(tl.float16), (values - high).to(tl.float16)


@triton.jit
def sum_rows(window, squares, before, PRECISE: tl.constexpr):
    """``before + window @ squares``: sums over the rows of windows.

    Windows are 0/1 matrices, exact in float16, so that two float16 products keep 22 bits of the
    other factor; the sums are float32. ``PRECISE``: all float64.
    """
    if PRECISE:
        sums = tl.dot(window, squares, before, out_dtype=tl.float64)
    else:
        high, low = split(tl.minimum(squares, HIGHEST))
        sums = tl.dot(window, low, tl.dot(window, high, before))
    return sums


@triton.jit
def sum_columns(by_row, window, before, PRECISE: tl.constexpr):
    """``before + by_row @ window``: the like over columns."""
    if PRECISE:
        sums = tl.dot(by_row, window, before, out_dtype=tl.float64)
    else:
        high, low = split(tl.minimum(by_row, HIGHEST))
        sums = tl.dot(low, window, tl.dot(high, window, before))
    return sums


@triton.jit
def row_window_matrix(first, last, o_slot, PRECISE: tl.constexpr):
    """1 where a slot is in a pair's window: ``[pairs, slots]``."""
    inside = (o_slot[None, :] >= first[:, None]) & (o_slot[None, :] < last[:, None])
    return inside.to(tl.float64 if PRECISE else tl.float16)


@triton.jit
def column_window_matrix(first, last, o_slot, PRECISE: tl.constexpr):
    """The like, transposed: ``[slots, pairs]``."""
    inside = (o_slot[:, None] >= first[None, :]) & (o_slot[:, None] < last[None, :])
    return inside.to(tl.float64 if PRECISE else tl.float16)


@triton.jit
def offsets(rows, columns, WIDTH: tl.constexpr):
    """``y * W + x`` of all rows and columns that two pointers hold."""
    return tl.load(rows)[:, None] * WIDTH + tl.load(columns)[None, :]


@triton.jit
def load_tile(
    x,
    row_tables,
    column_tables,
    i_row,
    i_column,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    COLUMN_CHUNKS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """What a tile needs for every image, in registers if it is little; and the pairs' centres.

    ``row_tables`` and ``column_tables`` are pointers to an ``AxisPlan``'s training, query,
    pair_training, first and last. Returns ``(x, slots, windows, queries, training, row_windows,
    column_windows)``, of which the last four are empty or hold a block of slots each.
    """
    o_row = tl.arange(0, ROW_BLOCK)
    o_column = tl.arange(0, COLUMN_BLOCK)
    o_row_pair = i_row * ROW_BLOCK + o_row
    o_column_pair = i_column * COLUMN_BLOCK + o_column
    slots = (
        row_tables[0] + i_row * (ROW_BLOCK * ROW_CHUNKS),
        row_tables[1] + i_row * (ROW_BLOCK * ROW_CHUNKS),
        column_tables[0] + i_column * (COLUMN_BLOCK * COLUMN_CHUNKS),
        column_tables[1] + i_column * (COLUMN_BLOCK * COLUMN_CHUNKS),
    )
    windows = (
        tl.load(row_tables[3] + o_row_pair),
        tl.load(row_tables[4] + o_row_pair),
        tl.load(column_tables[3] + o_column_pair),
        tl.load(column_tables[4] + o_column_pair),
    )
    queries = ()
    training = ()
    row_windows = ()
    column_windows = ()
    if ROW_CHUNKS * COLUMN_CHUNKS <= RESIDENT_CHUNKS:
        for j in tl.static_range(COLUMN_CHUNKS):
            o_column_slot = j * COLUMN_BLOCK + o_column
            column_windows = column_windows + (
                column_window_matrix(windows[2], windows[3], o_column_slot, PRECISE),
            )
            for i in tl.static_range(ROW_CHUNKS):
                o_row_slot = i * ROW_BLOCK + o_row
                query = x + offsets(slots[1] + o_row_slot, slots[3] + o_column_slot, WIDTH)
                queries = queries + (load_channels(query, PIXELS, C),)
                training = training + (
                    offsets(slots[0] + o_row_slot, slots[2] + o_column_slot, WIDTH),
                )
        for i in tl.static_range(ROW_CHUNKS):
            row_windows = row_windows + (
                row_window_matrix(windows[0], windows[1], i * ROW_BLOCK + o_row, PRECISE),
            )
    if ROW_CHUNKS * COLUMN_CHUNKS == 1:
        # The centre is in the slot of the same number, which the compiler can see only like this.
        centre = training[0]
    else:
        centre = offsets(row_tables[2] + o_row_pair, column_tables[2] + o_column_pair, WIDTH)
    return (x, slots, windows, queries, training, row_windows, column_windows), centre


@triton.jit
def tile_distances(
    tile,
    image,
    b_clean,
    slope,
    bias,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    COLUMN_CHUNKS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Biased distances of a tile's pairs to one image; ``b_clean``: its values at the centres."""
    x, slots, windows, queries, training, row_windows, column_windows = tile
    none = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float64 if PRECISE else tl.float32)
    total = none
    if ROW_CHUNKS * COLUMN_CHUNKS <= RESIDENT_CHUNKS:
        for j in tl.static_range(COLUMN_CHUNKS):
            by_row = none
            for i in tl.static_range(ROW_CHUNKS):
                if ROW_CHUNKS * COLUMN_CHUNKS == 1:
                    b_slot = b_clean
                else:
                    b_slot = clean_values(tl.load(image + training[j * ROW_CHUNKS + i]), C)
                squares = squared_difference(queries[j * ROW_CHUNKS + i], b_slot, slope, bias, C)
                by_row = sum_rows(row_windows[i], squares, by_row, PRECISE)
            total = sum_columns(by_row, column_windows[j], total, PRECISE)
    else:
        # Long windows of large images: blocks of slots one by one, loaded anew for each image.
        o_row = tl.arange(0, ROW_BLOCK)
        o_column = tl.arange(0, COLUMN_BLOCK)
        for i in tl.range(0, ROW_CHUNKS * COLUMN_CHUNKS):
            o_row_slot = (i // COLUMN_CHUNKS) * ROW_BLOCK + o_row
            o_column_slot = (i % COLUMN_CHUNKS) * COLUMN_BLOCK + o_column
            training_slot = offsets(slots[0] + o_row_slot, slots[2] + o_column_slot, WIDTH)
            query_slot = offsets(slots[1] + o_row_slot, slots[3] + o_column_slot, WIDTH)
            squares = squared_difference(
                load_channels(x + query_slot, PIXELS, C),
                clean_values(tl.load(image + training_slot), C),
                slope,
                bias,
                C,
            )
            row_window = row_window_matrix(windows[0], windows[1], o_row_slot, PRECISE)
            column_window = column_window_matrix(windows[2], windows[3], o_column_slot, PRECISE)
            by_row = sum_rows(row_window, squares, none, PRECISE)
            total += sum_columns(by_row, column_window, none, PRECISE)
    return total
