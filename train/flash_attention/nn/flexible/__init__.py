"""Mechanisms by name in MindSpore: registry.py (what one is), entries.py, vanilla.py (those of the package).

``nn.layer.flexible`` has the Cell that takes a name. Importing this package registers the mechanisms.
"""

from flash_attention.nn.flexible import entries, vanilla  # noqa: F401
from flash_attention.nn.flexible.registry import Mechanism, MechanismRegistry, Settings

__all__ = ["Mechanism", "MechanismRegistry", "Settings"]
