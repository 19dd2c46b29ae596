"""The JAX engines. One joins with a file beside this one and a place in the line below; `auto` is :mod:`choice`."""

from flash_attention.core.engine import EngineTable
from flash_attention.jax.engines import choice, cudnn, mosaic, pallas, reference, splash, xla

ENGINES = EngineTable("implementation")
for _module in (xla, pallas, mosaic, cudnn, splash, reference):
    ENGINES.add(choice.ranked(_module.ENGINE))
