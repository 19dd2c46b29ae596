"""Mechanisms that are the core call with something fixed, over one process or over several."""

from mindspore import ops

from flash_attention.core.registry import (
    ARGUMENTS,
    dilated_refusal,
    landmark_refusal,
    local_refusal,
    triangle_refusal,
)
from flash_attention.nn.flexible.registry import Mechanism, MechanismRegistry
from flash_attention.nn.layer.dilated import dilated_attention
from flash_attention.nn.layer.landmark import FusedLandmarkAttention
from flash_attention.ops.context import context_attention
from flash_attention.ops.functional import computable, flash_attention, swap

_BSND = (1, 2)  # the axes that lead to BNSD
EVERYTHING = tuple(ARGUMENTS) + ("engine",)


@MechanismRegistry.register
class FlashAttention2(Mechanism):
    """FlashAttention-2 (Dao, 2023): exact, memory linear in the lengths; takes every argument."""

    names = ("flash_attn2", "flash")
    takes = EVERYTHING

    def construct(
        self, query, key, value, bias, mask, alibi_slopes, sinks, q_segment_ids, kv_segment_ids, query_seq_lengths,
        key_value_seq_lengths, q_offset, dropout_seed,
    ):  # fmt: skip
        return flash_attention(
            query, key, value, bias, mask, scale=self.scale, is_causal=self.is_causal,
            query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=self.local_window_size, engine=self.engine,
            prev_block_num=self.prev_block_num, next_block_num=self.next_block_num,
            block_size=self.block_size, alibi_slopes=alibi_slopes,
            dropout_rate=0.0 if dropout_seed is None else self.dropout_rate, dropout_seed=dropout_seed,
            logits_soft_cap=self.logits_soft_cap, sinks=sinks, q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids, q_offset=self.position(query, key_value_seq_lengths, q_offset),
        )  # fmt: skip

    def position(self, query, filled, q_offset):
        """The ``q_offset`` of the core call; ``filled``: key_value_seq_lengths."""
        return q_offset


@MechanismRegistry.register
class Sdpa(FlashAttention2):
    """The engine that the package itself chooses for the call."""

    names = "sdpa"
    takes = tuple(ARGUMENTS)


@MechanismRegistry.register
class Blockwise(FlashAttention2):
    """Block after block in ordinary operators (Liu and Abbeel, 2023): engine 'portable', on any device."""

    names = "blockwise"
    takes = tuple(ARGUMENTS)

    def __init__(self, settings):
        super().__init__(settings._replace(engine="portable"))


@MechanismRegistry.register
class Triangle(FlashAttention2):
    """Causal attention that computes only the lower triangle of blocks: as many queries as keys."""

    names = "triangle"

    @classmethod
    def supports(cls, settings, query, key, given):
        return triangle_refusal(settings.is_causal, query[1], key[1])


@MechanismRegistry.register
class Local(FlashAttention2):
    """Attention within a window of tokens (``local_window_size``) or of blocks (``prev_block_num``, ...)."""

    names = "local"

    @classmethod
    def supports(cls, settings, query, key, given):
        return local_refusal(given)


@MechanismRegistry.register
class Autoregressive(FlashAttention2):
    """Decoding: few queries at the end of the cached keys; ``key_value_seq_lengths`` says how many are filled.

    Unless ``q_offset`` is given, the last query stands at the last filled key.
    """

    names = "autoregressive"

    def position(self, query, filled, q_offset):
        """The offset of the last filled key, unless one is given."""
        return filled - query.shape[1] if q_offset is None and filled is not None else q_offset


class _OverRanks(Mechanism):
    """The sequence over the ranks of a communication group; each gives and gets its own tokens."""

    takes = (
        "mask", "scale", "is_causal", "local_window_size", "prev_block_num", "next_block_num", "block_size",
        "alibi_slopes", "dropout_rate", "dropout_seed", "logits_soft_cap", "engine", "group",
    )  # fmt: skip
    strategy = None

    def construct(self, query, key, value, bias, mask, alibi_slopes, *rest):
        dropout_seed = rest[-1]
        rate = 0.0 if dropout_seed is None else self.dropout_rate
        options = (
            self.scale, self.is_causal, self.local_window_size, self.prev_block_num,
            self.next_block_num, self.block_size, rate, self.logits_soft_cap, None, "BNSD",
        )  # fmt: skip
        out, _ = context_attention(
            self.names, self.strategy, swap(query, _BSND), swap(key, _BSND), swap(value, _BSND), mask, alibi_slopes,
            dropout_seed, options, self.engine, self.group,
        )  # fmt: skip
        return swap(out, _BSND)


@MechanismRegistry.register
class Ring(_OverRanks):
    """Keys and values travel (Liu, Zaharia and Abbeel, 2023). See ``nn.RingAttention``."""

    names = strategy = "ring"


@MechanismRegistry.register
class Ulysses(_OverRanks):
    """An all-to-all trades tokens for heads (Jacobs et al., 2023). See ``nn.UlyssesAttention``."""

    names = strategy = "ulysses"


@MechanismRegistry.register
class Dilated(Mechanism):
    """LongNet (Ding et al., 2023): segments of ``segment_size`` tokens, of which every ``dilation_rate``-th is kept."""

    names = "dilated"
    takes = ("scale", "is_causal", "engine", "segment_size", "dilation_rate")

    @classmethod
    def supports(cls, settings, query, key, given):
        return dilated_refusal(settings.segment_size, settings.dilation_rate, query[1], key[1])

    def construct(self, query, key, value, *rest):
        return dilated_attention(
            query, repeat_heads(key, query), repeat_heads(value, query), self.segment_size, self.dilation_rate,
            is_causal=self.is_causal, scale=self.scale, engine=self.engine,
        )  # fmt: skip


@MechanismRegistry.register
class Landmark(Mechanism):
    """Landmark attention (Mohtashami and Jaggi, 2023): causal, the last of every ``block_size`` keys is a landmark."""

    names = "landmark"
    takes = ("scale", "is_causal", "block_size")

    def __init__(self, settings):
        super().__init__(settings)
        self.attend = FusedLandmarkAttention(sm_scale=settings.scale, block_size=settings.block_size)

    @classmethod
    def supports(cls, settings, query, key, given):
        return landmark_refusal(settings.is_causal, query[1], key[1], settings.block_size)

    def construct(self, query, key, value, *rest):
        key, value = repeat_heads(key, query), repeat_heads(value, query)
        return swap(self.attend(swap(query, _BSND), swap(key, _BSND), swap(value, _BSND)), _BSND)


def repeat_heads(x, query):
    """(B, S, K, D) with each head as often as heads of ``query`` (B, T, N, D) share it: 0, 0, 1, 1."""
    batch, length, heads, dim = x.shape
    group = query.shape[2] // heads
    if group == 1:
        return x
    return ops.tile(ops.expand_dims(computable(x), 3), (1, 1, 1, group, 1)).reshape((batch, length, -1, dim))
