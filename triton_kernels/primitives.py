"""The named pieces of which the kernels are made; each is one line of the mathematics.

Distances are in units of log2: ``D = log2(e) / (2 sigma^2) * ||x_patch - alpha k_patch||^2``, so
the logit to base 2 is -D. They are *biased*: every squared difference starts from minus what true
noise contributes, so that the sums of the candidates that matter stay near zero, where rounding is
least; a window has as many terms for all candidates of a pixel, so the bias drops out of the
weights.
"""

import triton
import triton.language as tl

# Finite, yet below every logit: exp2 of it is 0, and differences of it are not nan.
LOWEST = tl.constexpr(-1e30)
# Squares above this are cut: float16 ends at 65504. A candidate so far has no weight.
HIGHEST = tl.constexpr(30000.0)


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
def window_sums(squares, row_window, column_window, PRECISE: tl.constexpr):
    """``row_window @ squares @ column_window``: sums over a window's rows, then its columns.

    The windows are 0/1 matrices, exact in float16, so that two float16 products keep 22 bits of
    the other factor; the sums are float32. ``PRECISE``: all float64.
    """
    if PRECISE:
        by_row = tl.dot(row_window, squares, out_dtype=tl.float64)
        sums = tl.dot(by_row, column_window, out_dtype=tl.float64)
    else:
        high, low = split(tl.minimum(squares, HIGHEST))
        by_row = tl.dot(row_window, low, tl.dot(row_window, high))
        high, low = split(tl.minimum(by_row, HIGHEST))
        sums = tl.dot(low, column_window, tl.dot(high, column_window))
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
    """What a tile needs for every image: ``(x, slots, windows, in_registers)``, and the centres.

    ``row_tables`` and ``column_tables`` are pointers to an ``AxisPlan``'s training, query,
    pair_training, first and last.
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
    if ROW_CHUNKS * COLUMN_CHUNKS == 1:
        # The centre is in the slot of the same number, which the compiler can see only like this.
        centre = offsets(slots[0] + o_row, slots[2] + o_column, WIDTH)
        b_query = load_channels(
            x + offsets(slots[1] + o_row, slots[3] + o_column, WIDTH), PIXELS, C
        )
        in_registers = (
            b_query,
            row_window_matrix(windows[0], windows[1], o_row, PRECISE),
            column_window_matrix(windows[2], windows[3], o_column, PRECISE),
        )
    else:
        centre = offsets(row_tables[2] + o_row_pair, column_tables[2] + o_column_pair, WIDTH)
        in_registers = ()
    return (x, slots, windows, in_registers), centre


@triton.jit
def tile_distances(
    tile,
    image,
    centre,
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
    if ROW_CHUNKS * COLUMN_CHUNKS == 1:
        b_query, row_window, column_window = tile[3]
        squares = squared_difference(b_query, b_clean, slope, bias, C)
        total = window_sums(squares, row_window, column_window, PRECISE)
    else:
        # The window is longer than a block: as many blocks of slots as it takes.
        x, slots, windows = tile[0], tile[1], tile[2]
        o_row = tl.arange(0, ROW_BLOCK)
        o_column = tl.arange(0, COLUMN_BLOCK)
        total = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float64 if PRECISE else tl.float32)
        for i in tl.range(0, ROW_CHUNKS * COLUMN_CHUNKS):
            o_row_slot = (i // COLUMN_CHUNKS) * ROW_BLOCK + o_row
            o_column_slot = (i % COLUMN_CHUNKS) * COLUMN_BLOCK + o_column
            training = offsets(slots[0] + o_row_slot, slots[2] + o_column_slot, WIDTH)
            query = offsets(slots[1] + o_row_slot, slots[3] + o_column_slot, WIDTH)
            squares = squared_difference(
                load_channels(x + query, PIXELS, C),
                clean_values(tl.load(image + training), C),
                slope,
                bias,
                C,
            )
            row_window = row_window_matrix(windows[0], windows[1], o_row_slot, PRECISE)
            column_window = column_window_matrix(windows[2], windows[3], o_column_slot, PRECISE)
            total += window_sums(squares, row_window, column_window, PRECISE)
    return total
