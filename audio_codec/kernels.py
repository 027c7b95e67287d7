"""The layers of a live stream in compiled loops, for a CPU.

A frame of a live stream is a few rows wide. Its products read every weight once and use it a few
times, so what they cost is the reading: here the weights lie as they are stored, int8 with a scale
a row, a quarter of what float32 takes. And what stands between the products, dozens of operations
on a few thousand numbers, would cost torch more in calls than in arithmetic: here a whole block is
one call.

The arithmetic is that of the layers in torch, in float32, up to the order of sums. What does not
fit (other weights, more rows, training, a GPU) takes torch's way.

Compiled by numba when first imported, some seconds; later processes load it from its cache.

Shapes: B batch, T positions, C channels, M = B · T rows, N outputs, P positions or samples
of the past, S samples, W samples of a window, H query heads, G key/value heads, D head size, R ring
entries, U width of an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

F = np.float32

# All of fast-math but the leave to assume that no number is infinite or NaN.
_MATH = {"reassoc", "contract", "arcp", "nsz"}


def _compiled(signature: Any) -> Callable[[Any], Any]:
    """`numba.njit` at once, for the given types; kept for later processes where a folder can be."""

    def compile_(function: Any) -> Any:
        options: dict[str, Any] = {"fastmath": _MATH, "nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder that it may write to, or it is full
            return numba.njit(signature, **options)(function)

    return compile_


_f, _i = numba.float32, numba.int64
_v, _m, _t = _f[::1], _f[:, ::1], _f[:, :, ::1]
_int8 = numba.int8[:, ::1]
_matrix = (_int8, _v, _v)  # rows [N, K], scale [N], bias [N]


@_compiled(numba.void(_m, *_matrix, _m))
def dense(x: Any, rows: Any, scale: Any, bias: Any, y: Any) -> None:
    """[M, K] · int8 [N, K] with scale and bias [N] → y [M, N]."""
    many, width = x.shape
    count = len(rows)
    if many == 1:
        for n in range(count):
            total = F(0)
            for k in range(width):
                total += F(rows[n, k]) * x[0, k]
            y[0, n] = total * scale[n] + bias[n]
        return
    # Two rows of weights at a time meet four of x: as many sums as a processor has registers for.
    u, v = np.empty(width, F), np.empty(width, F)
    for n in range(0, count, 2):
        o = min(n + 1, count - 1)
        for k in range(width):
            u[k] = F(rows[n, k])
        for k in range(width):
            v[k] = F(rows[o, k])
        m = 0
        while m + 4 <= many:
            x0, x1, x2, x3 = x[m], x[m + 1], x[m + 2], x[m + 3]
            a0, a1, a2, a3 = F(0), F(0), F(0), F(0)
            b0, b1, b2, b3 = F(0), F(0), F(0), F(0)
            for k in range(width):
                p, q = u[k], v[k]
                a0 += p * x0[k]
                a1 += p * x1[k]
                a2 += p * x2[k]
                a3 += p * x3[k]
                b0 += q * x0[k]
                b1 += q * x1[k]
                b2 += q * x2[k]
                b3 += q * x3[k]
            y[m, n], y[m, o] = a0 * scale[n] + bias[n], b0 * scale[o] + bias[o]
            y[m + 1, n], y[m + 1, o] = a1 * scale[n] + bias[n], b1 * scale[o] + bias[o]
            y[m + 2, n], y[m + 2, o] = a2 * scale[n] + bias[n], b2 * scale[o] + bias[o]
            y[m + 3, n], y[m + 3, o] = a3 * scale[n] + bias[n], b3 * scale[o] + bias[o]
            m += 4
        while m < many:
            a0, b0 = F(0), F(0)
            for k in range(width):
                a0 += u[k] * x[m, k]
                b0 += v[k] * x[m, k]
            y[m, n], y[m, o] = a0 * scale[n] + bias[n], b0 * scale[o] + bias[o]
            m += 1


@_compiled(numba.void(_m, _v, _v, _f, numba.boolean, _m))
def normalize(x: Any, weight: Any, bias: Any, eps: Any, centered: Any, y: Any) -> None:
    """LayerNorm of each row [M, C], or RMSNorm where it is not `centered`."""
    width = x.shape[1]
    for m in range(len(x)):
        mean = F(0)
        if centered:
            for c in range(width):
                mean += x[m, c]
            mean /= F(width)
        square = F(0)
        for c in range(width):
            away = x[m, c] - mean
            square += away * away
        inverse = F(1) / np.sqrt(square / F(width) + eps)
        for c in range(width):
            y[m, c] = (x[m, c] - mean) * inverse * weight[c] + bias[c]


# erf(x) ≈ x · P(x²) / Q(x²) up to |x| = 4, where it is 1 to seven digits: a weighted least-squares
# fit, off by 4e-7 at most, which (unlike the library's function) a compiler can apply to eight
# numbers at a time.
_P = tuple(F(p) for p in (1.128379, 0.1962495, 0.05346754, 4.003667e-3, 2.8804177e-4, 1.9748245e-6))
_Q = tuple(F(q) for q in (1.0, 0.50725275, 0.11647663, 0.015444464, 1.2163648e-3, 3.7480826e-5))


@_compiled(numba.void(_v))
def _gelu(x: Any) -> None:
    """x · Φ(x), in place."""
    for k in range(len(x)):
        z = min(max(x[k] * F(math.sqrt(0.5)), F(-4)), F(4))
        s = z * z
        p = _P[0] + s * (_P[1] + s * (_P[2] + s * (_P[3] + s * (_P[4] + s * _P[5]))))
        q = _Q[0] + s * (_Q[1] + s * (_Q[2] + s * (_Q[3] + s * (_Q[4] + s * _Q[5]))))
        x[k] = F(0.5) * x[k] * (F(1) + z * p / q)


@_compiled(
    numba.void(
        *(_t, _t, numba.boolean[::1]),
        *(_m, _v, _v, _v, _f),
        *(*_matrix, *_matrix, _v, _t),
    )
)
def convnext(
    x: Any,
    tail: Any,
    active: Any,
    taps: Any,
    taps_bias: Any,
    norm: Any,
    norm_bias: Any,
    eps: Any,
    up: Any,
    up_scale: Any,
    up_bias: Any,
    down: Any,
    down_scale: Any,
    down_bias: Any,
    gain: Any,
    y: Any,
) -> None:
    """A ConvNeXt block: x [B, T, C], tail [B, P, C] (moves on where active) → y [B, T, C],
    which may be x itself.
    """
    batch, time, width = x.shape
    past = tail.shape[1]
    mixed = np.empty((batch * time, width), F)
    for b in range(batch):
        for t in range(time):
            row = mixed[b * time + t]
            row[:] = taps_bias
            for k in range(past + 1):
                source = tail[b, t + k] if t + k < past else x[b, t + k - past]
                for c in range(width):
                    row[c] += taps[k, c] * source[c]
        if active[b]:
            for k in range(past):
                tail[b, k] = tail[b, k + time] if k + time < past else x[b, k + time - past]
    normal, hidden = np.empty_like(mixed), np.empty((batch * time, len(up)), F)
    normalize(mixed, norm, norm_bias, eps, True, normal)
    dense(normal, up, up_scale, up_bias, hidden)
    _gelu(hidden.reshape(-1))
    dense(hidden, down, down_scale, down_bias, mixed)
    for b in range(batch):
        for t in range(time):
            for c in range(width):
                y[b, t, c] = x[b, t, c] + gain[c] * mixed[b * time + t, c]


@_compiled(
    numba.void(
        *(numba.int64[::1], numba.boolean[::1], _i, _i, numba.float64[::1]),
        *(numba.complex64[:, :, ::1], numba.boolean[:, :, ::1], numba.int64[:, ::1]),
    )
)
def positions(
    offset: Any,
    active: Any,
    window: Any,
    ahead: Any,
    frequencies: Any,
    turns: Any,
    seen: Any,
    entries: Any,
) -> None:
    """Where the next T positions of each slot stand; offset [B] moves on where active.

    `ahead` is the size of a block that sees its own end, `frequencies` [D / 2] radians a position
    → turns [B, T, D / 2], seen [B, T, R], entries [B, T].
    """
    batch, time, ring = seen.shape
    for b in range(batch):
        last = offset[b] + time - 1
        for t in range(time):
            now = offset[b] + t
            entries[b, t] = now % ring
            for d in range(len(frequencies)):
                angle = now * frequencies[d]  # in float64, as in `rotary`
                turns[b, t, d] = complex(math.cos(angle), math.sin(angle))
            end = now + ahead - 1 - now % ahead
            for r in range(ring):
                # Entry r holds the newest position ≤ last that is r modulo R; negative: nothing.
                held = last - (last - r) % ring
                seen[b, t, r] = held >= 0 and now - window < held and held <= end
        if active[b]:
            offset[b] += time


@_compiled(
    numba.void(
        *(_m, numba.complex64[:, :, ::1], numba.boolean[:, :, ::1], numba.int64[:, ::1]),
        *(_f[:, :, :, ::1], _f[:, :, :, ::1], _i, _m),
    )
)
def _attend(
    qkv: Any, turns: Any, seen: Any, entries: Any, keys: Any, values: Any, heads: Any, y: Any
) -> None:
    """Attention of qkv [M, (H + 2 G) · D] to rings [B, G, R, D], which take in what is new.

    turns [B, T, D / 2], or of no size where nothing is turned; seen [B, T, R]; entries [B, T], the
    place of each new key → y [M, H · D].
    """
    batch, time, ring = seen.shape
    groups, size = keys.shape[1], keys.shape[3]
    if turns.size:
        for b in range(batch):
            for t in range(time):
                row = qkv[b * time + t]
                for h in range(heads + groups):
                    for d in range(size // 2):
                        re, im = turns[b, t, d].real, turns[b, t, d].imag
                        first = row[h * size + 2 * d]
                        second = row[h * size + 2 * d + 1]
                        row[h * size + 2 * d] = first * re - second * im
                        row[h * size + 2 * d + 1] = first * im + second * re
    root = F(1) / np.sqrt(F(size))
    shares = np.empty(ring, F)
    for b in range(batch):
        for t in range(time):
            row, place = qkv[b * time + t], entries[b, t]
            for g in range(groups):
                at = (heads + g) * size
                keys[b, g, place] = row[at : at + size]
                at += groups * size
                values[b, g, place] = row[at : at + size]
        for t in range(time):
            for h in range(heads):
                query = qkv[b * time + t, h * size : (h + 1) * size]
                out = y[b * time + t, h * size : (h + 1) * size]
                key, value = keys[b, h * groups // heads], values[b, h * groups // heads]
                top = F(-np.inf)
                for r in range(ring):
                    if seen[b, t, r]:
                        score = F(0)
                        for d in range(size):
                            score += query[d] * key[r, d]
                        shares[r] = score * root
                        top = max(top, shares[r])
                mass = F(0)
                out[:] = F(0)
                for r in range(ring):
                    if seen[b, t, r]:
                        share = F(math.exp(shares[r] - top))
                        mass += share
                        for d in range(size):
                            out[d] += share * value[r, d]
                for d in range(size):
                    out[d] /= mass


@_compiled(
    numba.void(
        *(_t, numba.complex64[:, :, ::1], numba.boolean[:, :, ::1], numba.int64[:, ::1]),
        *(_f[:, :, :, ::1], _f[:, :, :, ::1], _i, numba.boolean, numba.boolean, _f),
        *(_v, _v, *_matrix, *_matrix),
        *(_v, _v, *_matrix, *_matrix, _t),
    )
)
def block(
    x: Any,
    turns: Any,
    seen: Any,
    entries: Any,
    keys: Any,
    values: Any,
    heads: Any,
    gated: Any,
    centered: Any,
    eps: Any,
    norm: Any,
    norm_bias: Any,
    qkv: Any,
    qkv_scale: Any,
    qkv_bias: Any,
    out: Any,
    out_scale: Any,
    out_bias: Any,
    mlp_norm: Any,
    mlp_norm_bias: Any,
    up: Any,
    up_scale: Any,
    up_bias: Any,
    down: Any,
    down_scale: Any,
    down_bias: Any,
    y: Any,
) -> None:
    """A transformer block: x [B, T, C] → y [B, T, C]; the rest as in `_attend`."""
    batch, time, width = x.shape
    many = batch * time
    flat, result = x.reshape(many, width), y.reshape(many, width)
    normal, part = np.empty((many, width), F), np.empty((many, width), F)
    normalize(flat, norm, norm_bias, eps, centered, normal)
    projected = np.empty((many, len(qkv)), F)
    dense(normal, qkv, qkv_scale, qkv_bias, projected)
    mixed = np.empty((many, out.shape[1]), F)
    _attend(projected, turns, seen, entries, keys, values, heads, mixed)
    dense(mixed, out, out_scale, out_bias, part)
    for m in range(many):
        for c in range(width):
            result[m, c] = flat[m, c] + part[m, c]
    normalize(result, mlp_norm, mlp_norm_bias, eps, centered, normal)
    raised = np.empty((many, len(up)), F)
    dense(normal, up, up_scale, up_bias, raised)
    inner = down.shape[1]
    hidden = np.empty((many, inner), F)
    for m in range(many):
        for k in range(inner):
            hidden[m, k] = raised[m, k]
            if gated:
                opened = raised[m, k] / (F(1) + F(math.exp(-raised[m, k])))
                hidden[m, k] = opened * raised[m, inner + k]
    if not gated:
        _gelu(hidden.reshape(-1))
    dense(hidden, down, down_scale, down_bias, part)
    for m in range(many):
        for c in range(width):
            result[m, c] += part[m, c]


@_compiled(numba.void(_m, _m, numba.boolean[::1], _v, _i, _t))
def windows(x: Any, tail: Any, active: Any, shape: Any, hop: Any, y: Any) -> None:
    """Windows of x [B, S] that end with their hop, shaped by [W] → y [B, S / hop, W].

    tail [B, P] holds the samples before x, P = W − hop (moves on where active).
    """
    past, samples = tail.shape[1], x.shape[1]
    for b in range(len(x)):
        for n in range(y.shape[1]):
            first = n * hop
            before = min(max(past - first, 0), len(shape))
            for w in range(before):
                y[b, n, w] = tail[b, first + w] * shape[w]
            for w in range(before, len(shape)):
                y[b, n, w] = x[b, first + w - past] * shape[w]
        if active[b]:
            for k in range(past):
                later = k + samples
                tail[b, k] = tail[b, later] if later < past else x[b, later - past]


_complex = numba.complex64[:, ::1]


@_compiled(numba.void(_complex, _f, _m))
def compress(spectrum: Any, gain: Any, y: Any) -> None:
    """Spectra [M, W / 2 + 1] times a gain → their real and imaginary parts, of magnitudes^0.3."""
    bins = spectrum.shape[1]
    for m in range(len(spectrum)):
        for f in range(bins):
            re, im = spectrum[m, f].real * gain, spectrum[m, f].imag * gain
            scale = F(math.exp(F(-0.7) * math.log(math.sqrt(re * re + im * im) + F(1e-6))))
            y[m, f], y[m, bins + f] = re * scale, im * scale


@_compiled(numba.void(_complex, _m, numba.int64[:, ::1], _f, _f, _f, _m))
def log_mel(
    spectrum: Any, filters: Any, spans: Any, floor: Any, mean: Any, deviation: Any, y: Any
) -> None:
    """Spectra [M, bins] → (log of the power in each band − mean) / deviation [M, bands].

    filters [bins, bands] are 0 outside of the spans [bands, 2].
    """
    power = np.empty(spectrum.shape[1], F)
    for m in range(len(spectrum)):
        for f in range(len(power)):
            re, im = spectrum[m, f].real, spectrum[m, f].imag
            power[f] = re * re + im * im
        for band in range(len(spans)):
            total = floor
            for f in range(spans[band, 0], spans[band, 1]):
                total += power[f] * filters[f, band]
            y[m, band] = (F(math.log(total)) - mean) / deviation


@_compiled(numba.void(_m, _f, _complex))
def polar(x: Any, cap: Any, spectrum: Any) -> None:
    """Log-magnitudes, at most `cap`, and phases, beside each other [M, 2 bins] → [M, bins]."""
    bins = spectrum.shape[1]
    for m in range(len(x)):
        for f in range(bins):
            magnitude, phase = F(math.exp(min(x[m, f], cap))), x[m, bins + f]
            spectrum[m, f] = complex(magnitude * math.cos(phase), magnitude * math.sin(phase))


@_compiled(numba.void(_t, _t, numba.boolean[::1], _v, _m))
def overlap_add(x: Any, tail: Any, active: Any, shape: Any, y: Any) -> None:
    """Windows x [B, T, W], shaped by [W] in place, each beginning with its hop → y [B, S].

    tail [B, P, W] holds the shaped windows before x that reach into it (moves on where active).
    """
    batch, time, width = x.shape
    past = tail.shape[1]
    hop = y.shape[1] // time
    for b in range(batch):
        for t in range(time):
            for w in range(width):
                x[b, t, w] *= shape[w]
        for t in range(time):
            out = y[b, t * hop : (t + 1) * hop]
            out[:] = x[b, t, :hop]
            for r in range(1, past + 1):  # piece r of a window falls on the hop r places later
                source = x[b, t - r] if t >= r else tail[b, past + t - r]
                for w in range(hop):
                    out[w] += source[r * hop + w]
        if active[b]:
            for k in range(past):
                tail[b, k] = tail[b, k + time] if k + time < past else x[b, k + time - past]


@_compiled(_i(_i))
def _mix(x: Any) -> Any:
    """As in `sampling`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


_GOLDEN = -7046029254386353131

_each = numba.int64[::1]


@_compiled(numba.void(_m, numba.int64[:, ::1], _each, _each, _v, _each, _v, _each))
def draw(
    value: Any,
    index: Any,
    seed: Any,
    counter: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    drawn: Any,
) -> None:
    """`sampling.sample` of falling logits and their tokens [B, V], settings a row each [B]."""
    p = np.empty(value.shape[1], F)
    for b in range(len(value)):
        drawn[b] = index[b, 0]
        if temperature[b] <= 0:
            continue
        kept = len(p) if top_k[b] <= 0 else min(top_k[b], len(p))
        heat, whole = max(temperature[b], F(1e-4)), F(0)
        for v in range(kept):
            p[v] = F(math.exp((value[b, v] - value[b, 0]) / heat))
            whole += p[v]
        reach, limit, last = F(0), top_p[b] * whole, 0
        for v in range(kept):
            if not reach < limit:
                break
            reach += p[v]
            last = v
        bits = _mix(_mix(seed[b] + _GOLDEN) + counter[b] * _GOLDEN)
        target = (F((bits >> 41) & 0x7FFFFF) + F(0.5)) / F(2**23) * reach
        reach = F(0)
        for v in range(last + 1):
            reach += p[v]
            if not reach < target:
                drawn[b] = index[b, v]
                break


@_compiled(numba.boolean(numba.int64[:, ::1], _t, _m))
def residual_sum(codes: Any, codebooks: Any, y: Any) -> Any:
    """The vectors [K, L, D] of codes [K' ≤ K, M], summed over K' → y [M, D].

    False, where one of them is no code.
    """
    y[:] = F(0)
    for k in range(len(codes)):
        for m in range(len(y)):
            if not 0 <= codes[k, m] < codebooks.shape[1]:
                return False
            for d in range(y.shape[1]):
                y[m, d] += codebooks[k, codes[k, m], d]
    return True


@_compiled(numba.void(_m, _t, _m, numba.int64[:, ::1]))
def residual_codes(x: Any, codebooks: Any, norms: Any, codes: Any) -> None:
    """Residual search: x [M, D] (is used up), codebooks [K, L, D], their norms [K, L] → [K, M]."""
    many, width = x.shape
    for k in range(len(codebooks)):
        for m in range(many):
            best, least = 0, F(np.inf)
            for n in range(codebooks.shape[1]):
                inner = F(0)
                for d in range(width):
                    inner += x[m, d] * codebooks[k, n, d]
                distance = norms[k, n] - F(2) * inner
                if distance < least:
                    best, least = n, distance
            codes[k, m] = best
            for d in range(width):
                x[m, d] -= codebooks[k, best, d]
