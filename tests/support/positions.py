"""Properties of the position encodings, once for both frameworks; `Encodings` is what a framework must provide."""

from fractions import Fraction

import numpy as np
import pytest

from flash_attention.core.mechanisms import positions as tables
from tolerances import FORWARD, GRADIENTS, assert_close

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 11, 8))
D_OUT = rng.standard_normal(X.shape)
POSITIONS = (np.arange(11) * 5 % 23).astype(np.int32)


def rotated(x, angles, interleaved=True, factors=1.0):
    """Rotate pair by pair, in float64, by complex multiplication."""
    half = x.shape[-1] // 2
    one, two = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    turned = (x[..., one] + 1j * x[..., two]) * np.exp(1j * angles) * factors
    out = np.empty_like(x)
    out[..., one], out[..., two] = turned.real, turned.imag
    return out


def xpos_judge(x, offset, downscale, scale_base, centre=None):
    """xPos as mechanisms.md states it."""
    n, d = x.shape[-2:]
    p = np.arange(n)[:, None] + float(offset)
    m = np.arange(d // 2)
    centre = int(np.ceil((n + offset) / 2)) if centre is None else centre
    factors = ((2 * m + 0.4 * d) / (1.4 * d)) ** ((p - centre) / scale_base)
    return rotated(x, p * 10000.0 ** (-2.0 * m / d), True, 1 / factors if downscale else factors)


def check(got, want, dtype="float32", direction=FORWARD, naive=None):
    """Within 4 eps of the largest value, or twice the error of `naive` where sums are long."""
    assert_close({"x": got}, {"x": want}, [{"x": want if naive is None else naive}], dtype, direction)


class Encodings:
    """A framework gives `run` (adapter), `rotary(**options)`, `xpos(...)` and `t5(table, bidirectional, distance)`."""

    @pytest.mark.parametrize("interleaved", [True, False])
    @pytest.mark.parametrize("positions", [None, POSITIONS], ids=["counted", "given"])
    def test_rotary(self, interleaved, positions):
        self.check_rotary(interleaved, positions, "float32")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_rotary_of_half_precision(self, dtype):
        self.check_rotary(True, None, dtype)

    def check_rotary(self, interleaved, positions, dtype):
        angles = (np.arange(11) if positions is None else positions)[:, None] * 10000.0 ** (-np.arange(4) / 4.0)
        x, d_out = X.astype("float16").astype(float), D_OUT
        if dtype == "bfloat16":
            x = np.round(x * 8) / 8
        out, (d_x,) = self.run(self.rotary(interleaved=interleaved), [x] + [positions][: positions is not None], d_out,
                               dtype)  # fmt: skip
        check(out, rotated(x, angles, interleaved), dtype)
        check(d_x, rotated(d_out, -angles, interleaved), dtype, GRADIENTS)  # a rotation's transpose turns back

    def test_rotary_of_some_features(self):
        out, (d_x,) = self.run(self.rotary(dims=4, base=100.0), [X], D_OUT)
        angles = np.arange(11)[:, None] * 100.0 ** (-np.arange(2) / 2.0)
        check(out[..., :4], rotated(X[..., :4], angles))
        check(out[..., 4:], X[..., 4:])
        check(d_x[..., 4:], D_OUT[..., 4:], direction=GRADIENTS)

    @pytest.mark.parametrize("downscale", [False, True])
    @pytest.mark.parametrize("offset", [0, 7])
    def test_xpos(self, offset, downscale):
        out, (d_x,) = self.run(self.xpos(downscale=downscale, scale_base=64, offset=offset), [X], D_OUT)
        check(out, xpos_judge(X, offset, downscale, 64))
        unit = np.eye(8).reshape(8, 1, 1, 8) * np.ones((11, 1))  # the map's matrix, a position at a time
        matrix = xpos_judge(unit, offset, downscale, 64)[:, 0]
        check(d_x, np.einsum("bhnd,mnd->bhnm", D_OUT, matrix), direction=GRADIENTS)

    def test_xpos_scores_depend_on_the_distance_only(self):
        q, k = (np.tile(row, (300, 1)) for row in rng.standard_normal((2, 16)))
        queries = self.run(self.xpos(scale_base=64), [q])[0]
        keys = self.run(self.xpos(downscale=True, scale_base=64), [k])[0]
        scores = queries @ keys.T
        for distance in (-20, -1, 0, 1, 50):
            diagonal = np.diagonal(scores, -distance)
            np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)

    def test_xpos_without_decay_is_rotary(self):
        out = self.run(self.xpos(scale_base=1e12), [X])[0]
        check(out, self.run(self.rotary(), [X])[0])

    def test_xpos_while_decoding(self):
        """The last query of 11 with 10 cached tokens: its scores equal the last row of the full computation."""
        keys = self.run(self.xpos(downscale=True), [X])[0]
        full = self.run(self.xpos(), [X])[0]
        last = self.run(self.xpos(offset=10), [X[:, :, -1:]])[0]
        check(last, full[:, :, -1:])
        check(last @ keys.swapaxes(-1, -2), (full @ keys.swapaxes(-1, -2))[:, :, -1:])

    def test_xpos_of_131072_tokens(self):
        """A centre a segment keeps every factor finite; within a segment, scores are those of a single centre."""
        x = np.ones((131072, 2))
        for dtype, segment in (("float32", 32768), ("float16", 4096)):
            q = self.run(self.xpos(segment=segment), [x], dtype=dtype)[0]
            k = self.run(self.xpos(downscale=True, segment=segment), [x], dtype=dtype)[0]
            assert np.isfinite(q).all() and np.isfinite(k).all()
        start = 3 * 32768
        q = self.run(self.xpos(segment=32768), [x])[0][start : start + 600 : 100]
        k = self.run(self.xpos(downscale=True, segment=32768), [x])[0][start : start + 600 : 100]
        short = x[:600]
        want = (xpos_judge(short, 0, False, 512) @ xpos_judge(short, 0, True, 512).T)[::100, ::100]
        np.testing.assert_allclose(q @ k.T, want, rtol=2e-4, atol=1e-4)

    def test_xpos_refuses_what_overflows(self):
        long = np.ones((70000, 2))
        with pytest.raises(ValueError, match="'n \\+ offset' must be at most 65391 in float32"):
            self.run(self.xpos(), [long])
        with pytest.raises(ValueError, match="must be at most 8173 in float16"):
            self.run(self.xpos(), [long[:9000]], dtype="float16")
        with pytest.raises(ValueError, match="'x' must be of an even last axis"):
            self.run(self.xpos(), [np.ones((4, 3))])

    @pytest.mark.parametrize("options, match", [
        ({"dims": 3}, "'dims' must be even"),
        ({"dims": 10}, "'dims' must be an int in"),
        ({"base": -1.0}, "'base' must be"),
        ({"interleaved": 1}, "'interleaved' must be a bool"),
    ])  # fmt: skip
    def test_rotary_refuses(self, options, match):
        with pytest.raises((ValueError, TypeError), match=match):
            self.run(self.rotary(**options), [X])

    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize("step", [0, 6])
    def test_t5_bias(self, bidirectional, step):
        table = rng.standard_normal((32, 5))
        d_out = rng.standard_normal((5, 9, 200))
        out, d_table = self.t5(table, 9, 200, step, bidirectional, d_out)
        buckets = np.array([[bucket(j - i - step, bidirectional) for j in range(200)] for i in range(9)])
        check(out, table.T[:, buckets])
        want, naive = np.zeros_like(table), np.zeros(table.shape, np.float32)
        np.add.at(want, buckets, d_out.transpose(1, 2, 0))
        np.add.at(naive, buckets, d_out.transpose(1, 2, 0).astype(np.float32))
        check(d_table, want, "float32", GRADIENTS, naive)
        np.testing.assert_array_equal(out[:, 1:, 1:], out[:, :-1, :-1])  # Toeplitz

    def test_alibi_bias(self):
        out = self.alibi(6, 5, 9, 4)
        slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 0, 0])
        distance = np.abs(np.arange(5)[:, None] + 4 - np.arange(9))
        np.testing.assert_allclose(out, -slopes[:, None, None] * distance, rtol=1e-6)


def bucket(relative, bidirectional, num_buckets=32, max_distance=128):
    """T5's bucket by exact arithmetic: the largest k with (n / e) ** (nb - e) >= (max / e) ** k."""
    nb, first = num_buckets, 0
    if bidirectional:
        nb //= 2
        first = nb if relative > 0 else 0
    n = abs(relative) if bidirectional else max(-relative, 0)
    e = nb // 2
    if n < e:
        return first + n
    k = 0
    while e + k < nb - 1 and Fraction(n, e) ** (nb - e) >= Fraction(max_distance, e) ** (k + 1):
        k += 1
    return first + e + k


def bucket_tables():
    """(num_buckets, max_distance, bidirectional) of the full tables to compare."""
    return [(nb, top, both) for nb in (8, 16, 32, 64) for top in (64, 128, 200) for both in (True, False)]


def check_bucket_table(num_buckets, max_distance, bidirectional):
    """Every distance against exact arithmetic; far ones saturate; a future key of the causal form has bucket 0."""
    relative = np.arange(-300, 301)
    got = tables.t5_buckets(relative, bidirectional, num_buckets, max_distance)
    assert got.tolist() == [bucket(int(x), bidirectional, num_buckets, max_distance) for x in relative]
    half = num_buckets // 2 if bidirectional else num_buckets
    assert (got[relative <= -max_distance] == half - 1).all()
    if bidirectional:
        assert (got[relative >= max_distance] == num_buckets - 1).all()
    else:
        assert (got[relative >= 0] == 0).all()
