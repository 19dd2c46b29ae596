"""Properties of grouped-query attention and its layer, once for both frameworks."""

import numpy as np
import pytest
from support.judge import check

from flash_attention.core import reference
from flash_attention.core.spec import AttentionSpec, Operands

H = 4
rng = np.random.default_rng(0)


def kv_heads_of(mapping, kv_heads):
    """Which key/value head each of the H query heads uses."""
    return np.arange(H) // (H // kv_heads) if mapping == "interleave" else np.arange(H) % kv_heads


def draws(nq, nk, kv_heads, dtype):
    """q (2, nq, H, 8), k, v (2, nk, kv_heads, 8), d_out; exact in the dtype."""
    shapes = ((2, nq, H, 8), (2, nk, kv_heads, 8), (2, nk, kv_heads, 8), (2, nq, H, 8))
    return [np.round(rng.standard_normal(shape) * 32) / 32 for shape in shapes] if dtype == "bfloat16" else [
        rng.standard_normal(shape).astype("float16").astype(float) for shape in shapes
    ]  # fmt: skip


def repeated(xp, tensors, mapping, causal, mask):
    """Results by name of ordinary attention with repeated keys and values, BSND: the judge."""
    heads = kv_heads_of(mapping, tensors[1].shape[2])
    q, k, v, d_out = (np.asarray(x, xp.float64).swapaxes(1, 2) for x in tensors)
    shape = None if mask is None else (mask.shape if mask.ndim == 4 else (1, 1) + mask.shape)
    spec = AttentionSpec(2, H, H, q.shape[2], k.shape[2], 8, causal=causal, mask_shape=shape)
    operands = Operands(mask=None if mask is None else mask.reshape(shape))
    out = reference.attention(xp, spec, q, k[:, heads], v[:, heads], operands)[0]
    grads = reference.attention_grad(spec, q, k[:, heads], v[:, heads], operands, d_out)
    results = {"out": out, "query": grads["query"], "key": np.zeros(k.shape), "value": np.zeros(k.shape)}
    for h, kv in enumerate(heads):
        results["key"][:, kv] += grads["key"][:, h]
        results["value"][:, kv] += grads["value"][:, h]
    return {name: x.swapaxes(1, 2) for name, x in results.items()}


class Grouped:
    """A framework gives `run` and `functions` (its adapter's), and `function(**options)`."""

    @pytest.mark.parametrize("mapping", ["interleave", "tile"])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_equals_repeated_keys_and_values(self, mapping, kv_heads):
        self.check(mapping, kv_heads, 7, 12, True, None, "float32")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, dtype):
        self.check("tile", 2, 9, 9, False, None, dtype)

    @pytest.mark.parametrize("shape", [(2, H, 7, 12), (7, 12)], ids=str)
    def test_mask(self, shape):
        mask = rng.random(shape) < 0.6
        mask[..., 3, :] = False  # a row that sees nothing
        self.check("tile", 2, 7, 12, False, mask, "float32")

    def check(self, mapping, kv_heads, nq, nk, causal, mask, dtype):
        tensors = draws(nq, nk, kv_heads, dtype)
        call = self.function(kv_head_mapping=mapping, is_causal=causal)
        out, grads = self.run(call, tensors[:3] + [mask] * (mask is not None), tensors[3], dtype)
        if mask is not None:
            assert not out[:, 3].any()
        got = dict(zip(("out", "query", "key", "value"), [out] + grads))
        check(got, lambda xp: repeated(xp, tensors, mapping, causal, mask), dtype, self.functions)

    def test_refuses_a_mapping(self):
        with pytest.raises(ValueError, match="'kv_head_mapping' must be one of 'interleave', 'tile'"):
            self.run(self.function(kv_head_mapping="other"), draws(3, 3, 2, "float32")[:3])


BAD_LAYERS = [
    ({"heads": 5}, "'dim' must be a multiple of heads = 5"),
    ({"kv_heads": 3}, "'kv_heads' must be a divisor of heads = 4"),
    ({"dim_head": 0}, "'dim_head' must be an int >= 1"),
    ({"causal": 1}, "'causal' must be a bool"),
    ({"kv_head_mapping": "block"}, "'kv_head_mapping' must be one of"),
]
