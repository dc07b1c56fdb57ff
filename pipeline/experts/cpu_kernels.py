"""What passes_cpu.py runs over each element, as loops that numba compiles for the processor at hand.

Compiled once for each dtype (about twenty seconds), then kept beside this file, or in the user's cache where that
cannot be written. bf16 comes and goes as its bits (uint16, which numpy has); all arithmetic is fp32. The loops run over
a chunk of columns for all tokens, so that the chunk's LoRA weights stay in the cache, and inner loops touch few arrays
that lie contiguous: more, and the compiler no longer proves that they do not overlap, and does not vectorise. Not-a-
number and infinity stay what they are.

Legend: C tokens, F FFN width, R LoRA rank (a multiple of `RANKS`), n LoRA experts, P pooled rows. `weights` are
(n, 3, R, F): B_gate transposed, B_up transposed, A_down. `low` is (C, n, 2, R): scaling A x, of gate and of up.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import overload

F4 = np.float32
COLUMNS = 512  # of a chunk
RANKS = 8  # `_expand` and `_contract` take so many ranks at once
TOKENS = 8  # `_outer` takes so many tokens at once
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
def _load(row, out):
    for f in range(out.size):
        out[f] = _widen(row[f])


@_compiled
def _expand(out, low, w):
    """out[f] += sum_j low[j] w[j, f]; a zero low product beside an infinite weight is not looked for."""
    for j in range(0, low.size, RANKS):
        l0, l1, l2, l3 = low[j], low[j + 1], low[j + 2], low[j + 3]
        l4, l5, l6, l7 = low[j + 4], low[j + 5], low[j + 6], low[j + 7]
        for f in range(out.size):
            first = l0 * w[j, f] + l1 * w[j + 1, f] + l2 * w[j + 2, f] + l3 * w[j + 3, f]
            out[f] += first + l4 * w[j + 4, f] + l5 * w[j + 5, f] + l6 * w[j + 6, f] + l7 * w[j + 7, f]


@_compiled
def _contract(values, w, sums):
    """sums[j] += sum_f values[f] w[j, f]"""
    for j in range(0, sums.size, RANKS):
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = F4(0)
        for f in range(values.size):
            v = values[f]
            s0 += v * w[j, f]
            s1 += v * w[j + 1, f]
            s2 += v * w[j + 2, f]
            s3 += v * w[j + 3, f]
            s4 += v * w[j + 4, f]
            s5 += v * w[j + 5, f]
            s6 += v * w[j + 6, f]
            s7 += v * w[j + 7, f]
        sums[j] += s0
        sums[j + 1] += s1
        sums[j + 2] += s2
        sums[j + 3] += s3
        sums[j + 4] += s4
        sums[j + 5] += s5
        sums[j + 6] += s6
        sums[j + 7] += s7


@_compiled
def _outer(total, low, rows):
    """total[j, f] += sum_i low[j, i] rows[i, f] over `TOKENS` tokens"""
    for j in range(total.shape[0]):
        l0, l1, l2, l3 = low[j, 0], low[j, 1], low[j, 2], low[j, 3]
        l4, l5, l6, l7 = low[j, 4], low[j, 5], low[j, 6], low[j, 7]
        for f in range(total.shape[1]):
            first = l0 * rows[0, f] + l1 * rows[1, f] + l2 * rows[2, f] + l3 * rows[3, f]
            total[j, f] += first + l4 * rows[4, f] + l5 * rows[5, f] + l6 * rows[6, f] + l7 * rows[7, f]


@_compiled
def forward(start, stop, a, b, low, weights, beta, noise, slot, share, shared, mixed, low_down, means):
    """Tokens `start` to `stop`, in the dtype of a: mixed (C, F) = sum_e beta_e h_e. Added to: low_down (C, n, R), the
    products A_down,e h_e before beta, and means (P, F).

    Args:
        a, b: (C, F); beta: (C, n); noise: (n, C, F), or of no size; slot, share: (C,), or of no size.
    """
    experts, _, _, width = weights.shape
    drops, pools = noise.size > 0, means.size > 0
    for column in range(0, width, COLUMNS):
        size = min(COLUMNS, width - column)
        end = column + size
        w = np.ascontiguousarray(weights[:, :, :, column:end])
        frozen_a, frozen_b, total = np.empty(size, F4), np.empty(size, F4), np.empty(size, F4)
        h, up = np.empty(size, F4), np.empty(size, F4)
        for t in range(start, stop):
            _load(a[t, column:end], frozen_a)
            _load(b[t, column:end], frozen_b)
            total[:] = F4(0)
            for e in range(experts):
                h[:] = frozen_a
                up[:] = frozen_b
                _expand(h, low[t, e, 0], w[e, 0])
                _expand(up, low[t, e, 1], w[e, 1])
                weigh = beta[t, e]
                for f in range(size):
                    value = h[f] * _sigmoid(h[f]) * up[f]
                    h[f] = value
                    total[f] += weigh * value
                if pools and e == shared:
                    row, part = means[slot[t], column:end], share[t]
                    for f in range(size):
                        row[f] += part * h[f]
                if drops:
                    _load(noise[e, t, column:end], up)
                    for f in range(size):
                        h[f] *= up[f]
                _contract(h, w[e, 2], low_down[t, e])
            out = mixed[t, column:end]
            for f in range(size):
                _store(out, f, total[f])


@_compiled
def backward(
    start,
    stop,
    a,
    b,
    low,
    weights,
    beta,
    noise,
    slot,
    share,
    shared,
    dmixed,
    dlow_down,
    dmeans,
    da,
    db,
    dlow,
    dlow_pooled,
    dbeta,
    dweights,
):
    """Tokens `start` to `stop`; what `forward` computed is computed again.

    Args:
        a to shared: as for `forward`.
        dmixed: (C, F); dlow_down: (C, n, R), of A_down,e (beta_e h_e); dmeans: (P, F), or of no size.
        da, db: (C, F), filled; dweights: like weights, filled with the sums over these tokens.
        dlow: (C, n, 2, R), dlow_pooled: (C, 2, R), dbeta: (C, n), added to; the first two are to be scaled.
    """
    experts, _, ranks, width = weights.shape
    drops, pools = noise.size > 0, dmeans.size > 0
    lows = np.zeros((3, ranks, TOKENS), F4)  # the low-rank side of each weight's gradient
    for column in range(0, width, COLUMNS):
        size = min(COLUMNS, width - column)
        end = column + size
        w = np.ascontiguousarray(weights[:, :, :, column:end])
        total = np.zeros(w.shape, F4)
        wides = np.zeros((3, TOKENS, size), F4)  # and the wide side
        frozen_a, frozen_b = np.empty((TOKENS, size), F4), np.empty((TOKENS, size), F4)
        above = np.empty((TOKENS, size), F4)
        sum_a, sum_b = np.empty((TOKENS, size), F4), np.empty((TOKENS, size), F4)
        gate, up, dh, keep = np.empty(size, F4), np.empty(size, F4), np.empty(size, F4), np.empty(size, F4)
        for first in range(start, stop, TOKENS):
            count = min(TOKENS, stop - first)
            for i in range(count):
                _load(a[first + i, column:end], frozen_a[i])
                _load(b[first + i, column:end], frozen_b[i])
                _load(dmixed[first + i, column:end], above[i])
            sum_a[:] = F4(0)
            sum_b[:] = F4(0)
            for e in range(experts):
                lows[:] = F4(0)  # for the tokens that a last run of them lacks
                for i in range(count):
                    t = first + i
                    weigh = beta[t, e]
                    d_gate, d_up, h, to_a, to_b = wides[0, i], wides[1, i], wides[2, i], sum_a[i], sum_b[i]
                    gate[:] = frozen_a[i]
                    up[:] = frozen_b[i]
                    _expand(gate, low[t, e, 0], w[e, 0])
                    _expand(up, low[t, e, 1], w[e, 1])
                    if drops:
                        dh[:] = F4(0)
                        _expand(dh, dlow_down[t, e], w[e, 2])
                        _load(noise[e, t, column:end], keep)
                        for f in range(size):
                            dh[f] *= keep[f]
                        for f in range(size):
                            dh[f] += above[i, f]
                    else:
                        dh[:] = above[i]
                        _expand(dh, dlow_down[t, e], w[e, 2])
                    for f in range(size):  # from here `gate` is dh/d(gate), `up` is dh/d(up)
                        soft = _sigmoid(gate[f])
                        active = gate[f] * soft
                        h[f] = active * up[f]
                        gate[f] = (soft + active * (F4(1) - soft)) * up[f]
                        up[f] = active
                    dot = F4(0)
                    for f in range(size):
                        dot += h[f] * dh[f]
                    dbeta[t, e] += dot
                    for f in range(size):
                        value = weigh * dh[f] * gate[f]
                        d_gate[f] = value
                        to_a[f] += value
                    for f in range(size):
                        value = weigh * dh[f] * up[f]
                        d_up[f] = value
                        to_b[f] += value
                    _contract(d_gate, w[e, 0], dlow[t, e, 0])
                    _contract(d_up, w[e, 1], dlow[t, e, 1])
                    if drops:
                        for f in range(size):
                            h[f] *= keep[f]
                    if pools and e == shared:  # reaches the LoRA pairs alone, not a, b or beta
                        row, part = dmeans[slot[t], column:end], share[t]
                        for f in range(size):
                            gate[f] *= part * row[f]
                        for f in range(size):
                            up[f] *= part * row[f]
                        _contract(gate, w[e, 0], dlow_pooled[t, 0])
                        _contract(up, w[e, 1], dlow_pooled[t, 1])
                        for f in range(size):
                            d_gate[f] += gate[f]
                        for f in range(size):
                            d_up[f] += up[f]
                    for j in range(ranks):
                        lows[0, j, i] = low[t, e, 0, j]
                        lows[1, j, i] = low[t, e, 1, j]
                        lows[2, j, i] = weigh * dlow_down[t, e, j]
                for place in range(3):
                    _outer(total[e, place], lows[place], wides[place])
            for i in range(count):
                out_a, out_b = da[first + i, column:end], db[first + i, column:end]
                from_a, from_b = sum_a[i], sum_b[i]
                for f in range(size):
                    _store(out_a, f, from_a[f])
                for f in range(size):
                    _store(out_b, f, from_b[f])
        dweights[:, :, :, column:end] = total
