"""Inputs of cross-modal attention and what its layers refuse, for both frameworks."""

import numpy as np

rng = np.random.default_rng(8)
X, X_OUT = rng.standard_normal((2, 2, 5, 16))
CONTEXT = rng.standard_normal((2, 7, 12))
KEEP = rng.random((2, 7)) < 0.6


BAD_LAYERS = [
    ({"num_heads": 3}, "'dim' must be a multiple of num_heads = 3"),
    ({"context_dim": 0}, "'context_dim' must be an int >= 1"),
    ({"add_bias_kv": 1}, "'add_bias_kv' must be a bool"),
    ({"dropout": 1.0}, "'dropout' must be"),
    ({"layer_scale": "row"}, "'layer_scale' must be one of None, 'per_channel', 'scalar'"),
    ({"layer_scale_init": -1.0}, "'layer_scale_init' must be"),
]
