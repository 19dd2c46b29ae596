"""FlashAttention-2 for MindSpore on Ascend, and its JAX twin. Start reading in `flash_attention/core`.

Importing this package loads no framework: sub-packages are imported when they are first used.

    from flash_attention.nn.layer.flash_attention import FlashAttention   # the MindSpore Cell
    from flash_attention.jax import FlashAttention, flash_attention       # the JAX twin (Python 3.10 or newer)
"""

import importlib

from ._version import __version__

__all__ = ["__version__"]

_SUBPACKAGES = frozenset(["core", "nn", "ops", "jax", "tools"])


def __getattr__(name):
    """Import a sub-package on first use, so that `flash_attention.jax` works after a plain `import flash_attention`."""
    if name in _SUBPACKAGES:
        return importlib.import_module("." + name, __name__)
    raise AttributeError("module {!r} has no attribute {!r}".format(__name__, name))


def __dir__():
    return sorted(set(globals()) | _SUBPACKAGES)
