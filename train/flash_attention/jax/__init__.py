"""The JAX twin: the same attention on TPU, GPU and CPU, and the numerical reference. Needs Python 3.10 and JAX.

``flash_attention`` is the functional call (BSND), ``FlashAttention`` the twin of the MindSpore Cell (BNSD),
``FlexibleAttentionModule`` the factory over every mechanism of ``AttentionRegistry``. The other mechanisms
(:mod:`flash_attention.jax.mechanisms`) and the transformers over all of them (:mod:`flash_attention.jax.transformer`)
are imported from here too, when they are first used.
"""

import sys

if sys.version_info < (3, 10):
    raise ImportError(
        "flash_attention.jax needs Python >= 3.10 (JAX 0.6 does), but this is Python {}.{}. "
        "The MindSpore half of the package works here.".format(*sys.version_info[:2])
    )

from flash_attention.core.lazy import lazy_names  # noqa: E402
from flash_attention.jax.engines import ENGINES  # noqa: E402
from flash_attention.jax.flexible import (  # noqa: E402
    AttentionBaseConfig,
    AttentionImpl,
    AttentionMetadata,
    AttentionOutput,
    AttentionRegistry,
    FlaxAttentionModule,
    FlexibleAttentionModule,
    PartitionAxis,
    run_attention_benchmarks,
)
from flash_attention.jax.functional import flash_attention  # noqa: E402
from flash_attention.jax.layer import FlashAttention  # noqa: E402
from flash_attention.jax.mechanisms import MECHANISMS  # noqa: E402
from flash_attention.jax.transformer import TRANSFORMER  # noqa: E402

__all__ = [
    "ENGINES",
    "AttentionBaseConfig",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionOutput",
    "AttentionRegistry",
    "FlashAttention",
    "FlaxAttentionModule",
    "FlexibleAttentionModule",
    "PartitionAxis",
    "flash_attention",
    "run_attention_benchmarks",
]
_LAZY = {"mechanisms." + module: names for module, names in MECHANISMS.items()}
_LAZY.update(("transformer." + module, names) for module, names in TRANSFORMER.items())
__getattr__, __dir__ = lazy_names("flash_attention.jax", _LAZY, globals())
