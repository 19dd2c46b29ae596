"""The JAX engines, in order of preference. An engine joins with one file beside this one and one line below."""

from flash_attention.core.engine import EngineTable
from flash_attention.jax.engines import reference, xla

ENGINES = EngineTable("implementation")
ENGINES.add(xla.ENGINE)
ENGINES.add(reference.ENGINE)
