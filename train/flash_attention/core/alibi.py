"""ALiBi slopes (Press, Smith and Lewis, "Train Short, Test Long", ICLR 2022) for any number of heads."""

import numpy as np

from flash_attention.core.errors import invalid_value


def alibi_slopes(heads, alibi_num_heads=None):
    """Slopes for ``heads`` *global* heads; the bias is ``-slope * |p - j|``.

    A power of two ``n`` gives the geometric sequence ``2**(-8 * (k + 1) / n)``. Otherwise the slopes of the largest
    power of two below are followed by every second slope of twice as many heads, as the authors do.

    Args:
        heads: number of heads, at least 1.
        alibi_num_heads: only the first so many heads are biased, the others get slope 0; None = all of them.

    Returns:
        float32 array of shape (heads,). Slice it along the heads to shard it.
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError("For 'alibi_slopes', 'heads' must be an int >= 1, but got {}.".format(heads))
    if alibi_num_heads is not None:
        if not isinstance(alibi_num_heads, int) or not 1 <= alibi_num_heads <= heads:
            need = "None or an int in [1, {}]".format(heads)
            raise invalid_value("alibi_slopes", "alibi_num_heads", need, alibi_num_heads)
        return np.concatenate([alibi_slopes(alibi_num_heads), np.zeros(heads - alibi_num_heads, np.float32)])
    power = 1 << (heads.bit_length() - 1)
    slopes = _geometric(power)
    if power != heads:
        slopes = np.concatenate([slopes, _geometric(2 * power)[0::2][: heads - power]])
    return slopes.astype(np.float32)


def _geometric(n):
    return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
