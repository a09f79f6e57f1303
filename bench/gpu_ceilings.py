"""Kernels that do nothing but exponentials, or nothing but multiply-adds: a card's ceilings."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["repeats"])
def exponentials(out, repeats, SIZE: tl.constexpr):
    """Four chains of exp2 an element."""
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = o.to(tl.float32) * -1e-9
    b, c, d = a - 0.1, a - 0.2, a - 0.3
    for _ in tl.range(0, repeats):
        a, b, c, d = tl.exp2(-a), tl.exp2(-b), tl.exp2(-c), tl.exp2(-d)
    tl.store(out + o, a + b + c + d)


@triton.jit(do_not_specialize=["repeats"])
def multiply_adds(out, repeats, SIZE: tl.constexpr):
    """Eight chains of multiply-adds an element."""
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = o.to(tl.float32) * 1e-9
    b, c, d = a + 0.1, a + 0.2, a + 0.3
    e, f, g, h = a + 0.4, a + 0.5, a + 0.6, a + 0.7
    for _ in tl.range(0, repeats):
        a, b, c, d = a * 0.9 + 0.1, b * 0.9 + 0.1, c * 0.9 + 0.1, d * 0.9 + 0.1
        e, f, g, h = e * 0.9 + 0.1, f * 0.9 + 0.1, g * 0.9 + 0.1, h * 0.9 + 0.1
    tl.store(out + o, a + b + c + d + e + f + g + h)
