"""Weights of a layer by name, the same in both frameworks: ``{"to_q.weight": array, ...}``.

JAX keeps them nested (a pytree of dicts), MindSpore as Parameters; both use these names, and nn.Dense's axes (out, in).
"""

import numpy as np


def flatten_params(params, prefix=""):
    """Nested dicts of arrays -> one dict with dotted names."""
    flat = {}
    for name, value in params.items():
        if isinstance(value, dict):
            flat.update(flatten_params(value, prefix + name + "."))
        else:
            flat[prefix + name] = value
    return flat


def unflatten_params(flat):
    """Dotted names -> nested dicts: from ``weights_of(cell)`` to a JAX layer's ``params``."""
    params = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[last] = np.asarray(value)
    return params
