"""Mechanism, one way to attend as a Cell, and MechanismRegistry, where it is found by name.

A mechanism is one decorated class; ``FlexibleAttention`` and the tests find it by the decorator:

    @MechanismRegistry.register
    class Mine(Mechanism):
        names = "mine"
        takes = ("is_causal", "mask")

        def construct(self, query, key, value, bias, mask, *rest):
            return ...

It reads static arguments from attributes of their names, tensors from ``construct``. What it does not list in
``takes`` is refused for it with a reason: a mechanism cannot ignore anything.
"""

from typing import NamedTuple, Optional, Tuple

from mindspore import nn

from flash_attention.core.registry import Registry
from flash_attention.core.spec import NO_LIMIT

TENSORS = (
    "bias", "mask", "alibi_slopes", "sinks", "q_segment_ids", "kv_segment_ids", "query_seq_lengths",
    "key_value_seq_lengths", "q_offset", "dropout_seed",
)  # fmt: skip
"""The tensors of ``Mechanism.construct`` after query, key and value, in order; None where absent."""


class Settings(NamedTuple):
    """The static arguments of a mechanism, under the keywords of ``flash_attention.ops.flash_attention``.

    Attributes:
        dropout_rate: acts in calls that are given a ``dropout_seed``.
        engine, group: as in ``flash_attention`` and ``RingAttention``.
        segment_size, dilation_rate: of 'dilated'.
    """

    scale: Optional[float] = None
    is_causal: bool = False
    local_window_size: object = None
    prev_block_num: int = NO_LIMIT
    next_block_num: int = NO_LIMIT
    block_size: int = 128
    dropout_rate: float = 0.0
    logits_soft_cap: Optional[float] = None
    engine: Optional[str] = None
    group: Optional[str] = None
    segment_size: object = None
    dilation_rate: object = None


class Mechanism(nn.Cell):
    """Base class of mechanisms: (B, T, N, D), (B, S, K, D) tensors in, the output (B, T, N, D) out.

    Args:
        settings: :class:`Settings`; its fields become attributes.

    Attributes:
        names: the name, or a tuple of the name and its aliases.
        takes: arguments of ``core.registry.ARGUMENTS`` and of Settings that it honours.
        forms_weights: True where ``construct`` returns (output, weights (B, N, T, S)).
    """

    names = ()
    takes: Tuple[str, ...] = ()
    forms_weights = False

    def __init__(self, settings):
        super().__init__()
        for name, value in zip(settings._fields, settings):
            setattr(self, name, value)

    @classmethod
    def supports(cls, settings, query, key, given):
        """None, or the Reason why a call whose argument names all fit cannot run.

        Args:
            settings: :class:`Settings`. query, key: shapes. given: names of the arguments that are set.
        """
        del settings, query, key, given

    @classmethod
    def get_impl_name(cls):
        """The name, without aliases."""
        return cls.names if isinstance(cls.names, str) else cls.names[0]


class MechanismRegistry(Registry):
    """MindSpore mechanisms by name; names that JAX's registry has too mean the same."""

    _classes = {}
    _aliases = {}
    absent = {
        "cudnn": "It belongs to the JAX twin; 'sdpa' takes the best engine of this device.",
        "sharded_vanilla": "It pins layouts on a JAX mesh; here 'vanilla' is sharded by MindSpore's strategies.",
        "splash": "It is a TPU kernel of JAX; 'flash_attn2' is the same attention.",
    }
