"""What passes_cpu.py runs over each element, as loops that numba compiles for the processor at hand.

Compiled once for each dtype (about ten seconds), then kept beside this file, or in the user's cache where that
cannot be written. bf16 comes and goes as its bits (uint16, which numpy has); all arithmetic is fp32. The loops take
`COLUMNS` of `TOKENS` tokens at once, so that they and the chunk's LoRA weights stay in the cache, and read every weight
once for two tokens. Not-a-number and infinity stay what they are.

What a loop works on lies in flat fp32 buffers of *rows*, `COLUMNS` numbers each: of one buffer the compiler knows which
rows overlap, so that it vectorises. Row numbers and places are unsigned, which saves the test for places counted from
the end.

Legend: C tokens, padded to a multiple of `TOKENS` in every array but those of width F; F FFN width, R LoRA rank (a
multiple of `RANKS`), n LoRA experts, P pooled rows. `weights` are (n, 3, R, F): B_gate transposed, B_up transposed,
A_down. `low` is (C, n, 2, R) laid flat: scaling A x, of gate and of up. What stands for padding is zero.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import overload

F4, U8 = np.float32, np.uint64
COLUMNS = 512  # of a row of a buffer
RANKS = 8  # `_expand` and `_contract` take so many ranks at once
TOKENS = 8  # tokens of a turn; `_outer` takes so many at once
ROW, ROW_2, ROW_3, ROW_4, ROW_5, ROW_6, ROW_7 = (U8(COLUMNS * place) for place in range(1, 8))  # the following rows
ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN = (U8(place) for place in range(1, 8))
FASTMATH = {"reassoc", "contract", "arcp", "nsz", "afn"}  # not nnan, not ninf


def _compiled(function: Callable) -> Callable:
    options = {"fastmath": FASTMATH, "nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder where the compiled code could be kept
        return njit(**options)(function)


def _widen(value):
    """bf16 bits, or fp32, to fp32."""


def _store(out, place, value):
    """out[place] = value, rounded to the nearest bf16, ties to even, where `out` holds bits of bf16."""


@overload(_widen, inline="always")
def _typed_widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@overload(_store, inline="always")
def _typed_store(out, place, value):
    if out.dtype != types.uint16:

        def store(out, place, value):
            out[place] = value

        return store

    def narrow(out, place, value):
        bits = F4(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        quiet = np.uint32(bits >> np.uint32(16)) | np.uint32(0x40)  # rounding must not turn a NaN into a number
        out[place] = np.uint16(rounded if value == value else quiet)

    return narrow


@njit(inline="always")
def _sigmoid(x):
    """1 / (1 + exp(-x)); exp by a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf: relative error below 2e-7)."""
    x = -x
    x = F4(88.0) if x > F4(88.0) else x
    x = F4(-87.0) if x < F4(-87.0) else x
    power = np.rint(x * F4(1.4426950408889634))
    r = x - power * F4(0.693359375)
    r = r + power * F4(2.12194440e-4)
    p = F4(1.9875691500e-4)
    p = p * r + F4(1.3981999507e-3)
    p = p * r + F4(8.3334519073e-3)
    p = p * r + F4(4.1665795894e-2)
    p = p * r + F4(1.6666665459e-1)
    p = p * r + F4(5.0000001201e-1)
    p = p * r * r + r + F4(1)
    two_to_power = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return F4(1) / (F4(1) + p * two_to_power)


@_compiled
def _load(source, column, size, buffer, row):
    """A row of the buffer from `size` columns of a token, zeros behind them."""
    at = row * ROW
    for f in range(U8(size)):
        buffer[at + f] = _widen(source[U8(column) + f])
    for f in range(U8(size), ROW):
        buffer[at + f] = F4(0)


@_compiled
def _unload(buffer, row, out, column, size):
    at = row * ROW
    for f in range(U8(size)):
        _store(out, U8(column) + f, buffer[at + f])


@_compiled
def _clear(buffer, row, rows):
    for f in range(row * ROW, (row + rows) * ROW):
        buffer[f] = F4(0)


@_compiled
def _expand(buffer, source, to, low, at, stride, weights, row, ranks):
    """For `TOKENS` rows of the buffer: row `to` = row `source` + sum_j low[at + stride i + j] weights[row + j]."""
    for token in range(U8(0), U8(TOKENS), TWO):
        s, o = (source + token) * ROW, (to + token) * ROW
        for j in range(U8(0), ranks, U8(RANKS)):
            x = at + token * stride + j
            y = x + stride
            x0, x1, x2, x3 = low[x], low[x + ONE], low[x + TWO], low[x + THREE]
            x4, x5, x6, x7 = low[x + FOUR], low[x + FIVE], low[x + SIX], low[x + SEVEN]
            y0, y1, y2, y3 = low[y], low[y + ONE], low[y + TWO], low[y + THREE]
            y4, y5, y6, y7 = low[y + FOUR], low[y + FIVE], low[y + SIX], low[y + SEVEN]
            p = (row + j) * ROW
            for f in range(ROW):
                w0, w1, w2 = weights[p + f], weights[p + ROW + f], weights[p + ROW_2 + f]
                w3, w4, w5 = weights[p + ROW_3 + f], weights[p + ROW_4 + f], weights[p + ROW_5 + f]
                w6, w7 = weights[p + ROW_6 + f], weights[p + ROW_7 + f]
                v = buffer[s + f] + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
                buffer[o + f] = v + x4 * w4 + x5 * w5 + x6 * w6 + x7 * w7
                v = buffer[s + ROW + f] + y0 * w0 + y1 * w1 + y2 * w2 + y3 * w3
                buffer[o + ROW + f] = v + y4 * w4 + y5 * w5 + y6 * w6 + y7 * w7
            s = o


@_compiled
def _contract(buffer, source, sums, at, stride, weights, row, ranks):
    """For `TOKENS` rows of the buffer: sums[at + stride i + j] += sum_f (row `source`)[f] weights[row + j, f]."""
    for token in range(U8(0), U8(TOKENS), TWO):
        s = (source + token) * ROW
        for j in range(U8(0), ranks, U8(RANKS)):
            x0 = x1 = x2 = x3 = x4 = x5 = x6 = x7 = F4(0)
            y0 = y1 = y2 = y3 = y4 = y5 = y6 = y7 = F4(0)
            p = (row + j) * ROW
            for f in range(ROW):
                v, w = buffer[s + f], buffer[s + ROW + f]
                m, n = weights[p + f], weights[p + ROW + f]
                x0, y0 = x0 + v * m, y0 + w * m
                x1, y1 = x1 + v * n, y1 + w * n
                m, n = weights[p + ROW_2 + f], weights[p + ROW_3 + f]
                x2, y2 = x2 + v * m, y2 + w * m
                x3, y3 = x3 + v * n, y3 + w * n
                m, n = weights[p + ROW_4 + f], weights[p + ROW_5 + f]
                x4, y4 = x4 + v * m, y4 + w * m
                x5, y5 = x5 + v * n, y5 + w * n
                m, n = weights[p + ROW_6 + f], weights[p + ROW_7 + f]
                x6, y6 = x6 + v * m, y6 + w * m
                x7, y7 = x7 + v * n, y7 + w * n
            x = at + token * stride + j
            _add_eight(sums, x, x0, x1, x2, x3, x4, x5, x6, x7)
            _add_eight(sums, x + stride, y0, y1, y2, y3, y4, y5, y6, y7)


@njit(inline="always")
def _add_eight(sums, at, v0, v1, v2, v3, v4, v5, v6, v7):
    sums[at] += v0
    sums[at + ONE] += v1
    sums[at + TWO] += v2
    sums[at + THREE] += v3
    sums[at + FOUR] += v4
    sums[at + FIVE] += v5
    sums[at + SIX] += v6
    sums[at + SEVEN] += v7


@_compiled
def _outer(total, place, low, at, stride, buffer, row, ranks):
    """total[place + j] += sum_i low[at + stride i + j] (row `row` + i of the buffer), over `TOKENS` tokens."""
    r = row * ROW
    for j in range(U8(0), ranks, TWO):
        x = at + j
        y = x + ONE
        x0, x1, x2, x3 = low[x], low[x + stride], low[x + TWO * stride], low[x + THREE * stride]
        y0, y1, y2, y3 = low[y], low[y + stride], low[y + TWO * stride], low[y + THREE * stride]
        x, y = x + FOUR * stride, y + FOUR * stride
        x4, x5, x6, x7 = low[x], low[x + stride], low[x + TWO * stride], low[x + THREE * stride]
        y4, y5, y6, y7 = low[y], low[y + stride], low[y + TWO * stride], low[y + THREE * stride]
        o = (place + j) * ROW
        for f in range(ROW):
            v0, v1, v2, v3 = buffer[r + f], buffer[r + ROW + f], buffer[r + ROW_2 + f], buffer[r + ROW_3 + f]
            v4, v5 = buffer[r + ROW_4 + f], buffer[r + ROW_5 + f]
            v6, v7 = buffer[r + ROW_6 + f], buffer[r + ROW_7 + f]
            first = x0 * v0 + x1 * v1 + x2 * v2 + x3 * v3
            total[o + f] += first + x4 * v4 + x5 * v5 + x6 * v6 + x7 * v7
            first = y0 * v0 + y1 * v1 + y2 * v2 + y3 * v3
            total[o + ROW + f] += first + y4 * v4 + y5 * v5 + y6 * v6 + y7 * v7


@_compiled
def _multiply(buffer, row, other):
    for f in range(U8(TOKENS) * ROW):
        buffer[row * ROW + f] *= buffer[other * ROW + f]


@_compiled
def _add(buffer, row, other, rows):
    for f in range(U8(rows) * ROW):
        buffer[row * ROW + f] += buffer[other * ROW + f]


@_compiled
def _cut(weights, column, size, out):
    """The chunk's columns of all weights, a row each."""
    experts, places, ranks, _ = weights.shape
    for e, place, j in np.ndindex((experts, places, ranks)):
        _load(weights[e, place, j], column, size, out, U8((e * places + place) * ranks + j))


# rows of the forward buffer, `TOKENS` each
A, B, GATE, UP, MIXED = (U8(TOKENS * place) for place in range(5))
NOISE = UP  # once h is known


@_compiled
def _activate(buffer, token, weigh):
    """gate -> h = SiLU(gate) up, and mixed += weigh h"""
    gate, up, mixed = (GATE + token) * ROW, (UP + token) * ROW, (MIXED + token) * ROW
    for f in range(ROW):
        value = buffer[gate + f]
        value *= _sigmoid(value) * buffer[up + f]
        buffer[gate + f] = value
        buffer[mixed + f] += weigh * value


@_compiled
def _pool(buffer, token, part, means, column, size):
    h = (GATE + token) * ROW
    for f in range(U8(size)):
        means[U8(column) + f] += part * buffer[h + f]


@_compiled
def forward(start, stop, a, b, low, weights, beta, noise, slot, share, shared, mixed, low_down, means):
    """Tokens `start` to `stop`, in the dtype of a: mixed (C, F) = sum_e beta_e h_e. Added to: low_down (C, n, R) laid
    flat, the products A_down,e h_e before beta, and means (P, F).

    Args:
        start: a multiple of `TOKENS`.
        a, b: (C, F); beta: (C, n); noise: (n, C, F), or of no size; slot, share: (C,), or of no size.
    """
    experts, _, ranks, width = weights.shape
    drops, pools, r = noise.size > 0, means.size > 0, U8(ranks)
    stride = U8(experts * 2 * ranks)
    w = np.empty(experts * 3 * ranks * COLUMNS, F4)
    buffer = np.empty(5 * TOKENS * COLUMNS, F4)
    for column in range(0, width, COLUMNS):
        size = min(COLUMNS, width - column)
        _cut(weights, column, size, w)
        for first in range(start, stop, TOKENS):
            count = min(TOKENS, stop - first)
            if count < TOKENS:
                _clear(buffer, A, U8(2 * TOKENS))
            for i in range(count):
                _load(a[first + i], column, size, buffer, A + U8(i))
                _load(b[first + i], column, size, buffer, B + U8(i))
            _clear(buffer, MIXED, U8(TOKENS))
            for e in range(experts):
                at, row = U8((first * experts + e) * 2 * ranks), U8(e * 3 * ranks)
                _expand(buffer, A, GATE, low, at, stride, w, row, r)
                _expand(buffer, B, UP, low, at + r, stride, w, row + r, r)
                for i in range(TOKENS):
                    _activate(buffer, U8(i), beta[first + i, e])
                if pools and e == shared:
                    for i in range(count):
                        _pool(buffer, U8(i), share[first + i], means[slot[first + i]], column, size)
                if drops:
                    for i in range(count):
                        _load(noise[e, first + i], column, size, buffer, NOISE + U8(i))
                    _multiply(buffer, GATE, NOISE)
                at = U8((first * experts + e) * ranks)
                _contract(buffer, GATE, low_down, at, U8(experts * ranks), w, row + TWO * r, r)
            for i in range(count):
                _unload(buffer, MIXED + U8(i), mixed[first + i], column, size)


# rows of the backward buffer, `TOKENS` each
A, B, D_GATE, D_UP, D_H, ABOVE, SUM_A, SUM_B, MEANS, POOLED = (U8(TOKENS * place) for place in range(10))


@_compiled
def _differentiate(buffer, token, weigh, pools, part):
    """One token of one LoRA expert.

    gate, up and dh become the gradients of gate and up and weigh h; the sums for a and b are added to. Where it
    pools, the gradient of the pooled mean becomes those of gate and up through it. Returns h dh, weigh's gradient.
    """
    gate, up, dh = (D_GATE + token) * ROW, (D_UP + token) * ROW, (D_H + token) * ROW
    sum_a, sum_b = (SUM_A + token) * ROW, (SUM_B + token) * ROW
    mean, pooled_up = (MEANS + token) * ROW, (POOLED + token) * ROW
    dot = F4(0)
    for f in range(ROW):
        g, u, d = buffer[gate + f], buffer[up + f], buffer[dh + f]
        soft = _sigmoid(g)
        active = g * soft
        slope = (soft + active * (F4(1) - soft)) * u
        h = active * u
        dot += h * d
        d *= weigh
        buffer[dh + f] = weigh * h
        buffer[gate + f] = d * slope
        buffer[up + f] = d * active
        buffer[sum_a + f] += d * slope
        buffer[sum_b + f] += d * active
        if pools:
            above = part * buffer[mean + f]
            buffer[mean + f] = above * slope
            buffer[pooled_up + f] = above * active
    return dot


@_compiled
def backward(start, stop, a, b, low, weights, beta, noise, slot, share, shared, above, gradients):
    """Tokens `start` to `stop`; what `forward` computed is computed again.

    Args:
        start to shared: as for `forward`.
        above: dmixed (C, F); dlow_down (C, n, R) laid flat, of A_down,e (beta_e h_e); dmeans (P, F), or of no size.
        gradients: da, db (C, F), filled; dlow (C, n, 2, R) and dlow_pooled (C, 2, R), laid flat, both to be scaled, and
            dbeta (C, n), added to; dweights, like weights, filled with the sums over these tokens.
    """
    dmixed, dlow_down, dmeans = above
    da, db, dlow, dlow_pooled, dbeta, dweights = gradients
    experts, _, ranks, width = weights.shape
    drops, pools, r = noise.size > 0, dmeans.size > 0, U8(ranks)
    stride, stride_down = U8(experts * 2 * ranks), U8(experts * ranks)
    w = np.empty(experts * 3 * ranks * COLUMNS, F4)
    total = np.empty(w.size, F4)
    buffer = np.zeros(10 * TOKENS * COLUMNS, F4)
    for column in range(0, width, COLUMNS):
        size = min(COLUMNS, width - column)
        _cut(weights, column, size, w)
        total[:] = F4(0)
        for first in range(start, stop, TOKENS):
            count = min(TOKENS, stop - first)
            if count < TOKENS:
                for row in (A, B, ABOVE, MEANS):
                    _clear(buffer, row, U8(TOKENS))
            for i in range(count):
                _load(a[first + i], column, size, buffer, A + U8(i))
                _load(b[first + i], column, size, buffer, B + U8(i))
                _load(dmixed[first + i], column, size, buffer, ABOVE + U8(i))
            _clear(buffer, SUM_A, U8(2 * TOKENS))
            for e in range(experts):
                at, row = U8((first * experts + e) * 2 * ranks), U8(e * 3 * ranks)
                at_down, row_down = U8((first * experts + e) * ranks), row + TWO * r
                pooled = pools and e == shared
                _expand(buffer, A, D_GATE, low, at, stride, w, row, r)
                _expand(buffer, B, D_UP, low, at + r, stride, w, row + r, r)
                if drops:
                    for i in range(count):
                        _load(noise[e, first + i], column, size, buffer, POOLED + U8(i))
                    _clear(buffer, D_H, U8(TOKENS))
                    _expand(buffer, D_H, D_H, dlow_down, at_down, stride_down, w, row_down, r)
                    _multiply(buffer, D_H, POOLED)
                    _add(buffer, D_H, ABOVE, TOKENS)
                else:
                    _expand(buffer, ABOVE, D_H, dlow_down, at_down, stride_down, w, row_down, r)
                if pooled:
                    for i in range(count):
                        _load(dmeans[slot[first + i]], column, size, buffer, MEANS + U8(i))
                for i in range(TOKENS):
                    part = share[first + i] if pooled else F4(0)
                    dbeta[first + i, e] += _differentiate(buffer, U8(i), beta[first + i, e], pooled, part)
                _contract(buffer, D_GATE, dlow, at, stride, w, row, r)
                _contract(buffer, D_UP, dlow, at + r, stride, w, row + r, r)
                if pooled:  # reaches the LoRA pairs alone, not a, b or beta
                    two = U8(2 * ranks)
                    _contract(buffer, MEANS, dlow_pooled, U8(first) * two, two, w, row, r)
                    _contract(buffer, POOLED, dlow_pooled, U8(first) * two + r, two, w, row + r, r)
                    _add(buffer, D_GATE, MEANS, TOKENS)
                    _add(buffer, D_UP, POOLED, TOKENS)
                if drops:
                    for i in range(count):
                        _load(noise[e, first + i], column, size, buffer, POOLED + U8(i))
                    _multiply(buffer, D_H, POOLED)
                _outer(total, row, low, at, stride, buffer, D_GATE, r)
                _outer(total, row + r, low, at + r, stride, buffer, D_UP, r)
                _outer(total, row_down, dlow_down, at_down, stride_down, buffer, D_H, r)
            for i in range(count):
                _unload(buffer, SUM_A + U8(i), da[first + i], column, size)
                _unload(buffer, SUM_B + U8(i), db[first + i], column, size)
        for e, place, j in np.ndindex((experts, 3, ranks)):
            _unload(total, U8((e * 3 + place) * ranks + j), dweights[e, place, j], column, size)
