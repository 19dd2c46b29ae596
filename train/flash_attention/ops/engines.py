"""The MindSpore engines, in order of preference. An engine joins with one file or folder here and one line below."""

from flash_attention.core.engine import EngineTable
from flash_attention.ops import aclnn, jax_bridge, portable, simulator, tik

ENGINES = EngineTable("engine")
ENGINES.add(tik.ENGINE)
ENGINES.add(aclnn.ENGINE)
ENGINES.add(jax_bridge.ENGINE)
ENGINES.add(portable.ENGINE)
ENGINES.add(simulator.ENGINE)
