"""What every mechanism returns."""

import dataclasses
from typing import Optional

import jax

from flash_attention.jax.flexible.record import Record


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput(Record):
    """The result of a mechanism; a pytree.

    Attributes:
        attention_weights: (B, N, T, S), what multiplied the values (after dropout), from the mechanisms that form them
            ('vanilla', 'sharded_vanilla'); None from all others.
        attention_outputs: (B, T, N, D).
    """

    attention_weights: Optional[jax.Array] = None
    attention_outputs: Optional[jax.Array] = None
