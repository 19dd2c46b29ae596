"""Mechanisms that are the blockwise core call with something fixed.

'flash_attn2', 'blockwise', 'triangle', 'local', 'autoregressive'; over a mesh also 'ring' and 'ulysses'.
"""

from flash_attention.core.registry import local_refusal, triangle_refusal
from flash_attention.jax import distributed
from flash_attention.jax.flexible.partition import AUTOREGRESSIVE, INSERT, TRAIN
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry, output_of
from flash_attention.jax.functional import attend, call_of


@AttentionRegistry.register
class FlashAttention2(AttentionImpl):
    """FlashAttention-2 (Dao, 2023): exact, memory linear in the lengths; takes every argument.

    On a mesh each device computes its part, and the sequence is split by the strategy that sends least.
    """

    names = ("flash_attn2", "flash")
    strategy = None  # of distributed.attention: the one that sends least

    def forward_native(self, query, key, value, *, mode=TRAIN, **arguments):
        # A query that is not split along the sequence meets keys that are: results are merged, keys stay.
        decoding = "merge" if mode in (AUTOREGRESSIVE, INSERT) else None
        return output_of(self.attend(query, key, value, self.strategy or decoding, **arguments))

    def attend(self, query, key, value, strategy, **arguments):
        """The core call, on one device or over the mesh by ``strategy``."""
        metadata = self.metadata
        if metadata.mesh is None or metadata.mesh.size == 1 or not metadata.shard_attention_computation:
            return attend(self.get_impl_name(), query, key, value, *call_of(**arguments), with_lse=False)[0]
        axis = metadata.partition_axis
        return distributed.attention(
            query,
            key,
            value,
            mesh=metadata.mesh,
            axes=distributed.Axes(axis.batch_axis, axis.head_axis, metadata.sequence_axis_name),
            strategy=strategy,
            scan=metadata.scan_ring_attention,
            **arguments,
        )


@AttentionRegistry.register
class Blockwise(FlashAttention2):
    """The same with compute tiles of exactly ``blocksize_q`` x ``blocksize_k``, the chunks of Liu and Abbeel (2023)."""

    names = "blockwise"

    def attend(self, query, key, value, strategy, **arguments):
        tile = (self.metadata.blocksize_q, self.metadata.blocksize_k)
        return super().attend(query, key, value, strategy, tile=tile, **arguments)


@AttentionRegistry.register
class Ring(FlashAttention2):
    """The sequence split over devices; keys and values travel (Liu, Zaharia and Abbeel, 2023)."""

    names = "ring"
    strategy = "ring"


@AttentionRegistry.register
class Ulysses(FlashAttention2):
    """The sequence split over devices; an all-to-all trades tokens for heads (Jacobs et al., 2023)."""

    names = "ulysses"
    strategy = "ulysses"


@AttentionRegistry.register
class Triangle(FlashAttention2):
    """Causal attention that computes only the lower triangle of blocks: as many queries as keys."""

    names = "triangle"

    def supports(self, query, key, value, arguments):
        return triangle_refusal(bool(arguments.get("is_causal")), query.shape[1], key.shape[1])


@AttentionRegistry.register
class Local(FlashAttention2):
    """Attention within a window of tokens (``local_window_size``) or of blocks (``prev_block_num``, ...)."""

    names = "local"

    def supports(self, query, key, value, arguments):
        return local_refusal(arguments)


@AttentionRegistry.register
class Autoregressive(FlashAttention2):
    """Decoding: few queries at the end of the cached keys; ``key_value_seq_lengths`` says how many are filled.

    Unless ``q_offset`` is given, the last query stands at the last filled key.
    """

    names = "autoregressive"

    def attend(self, query, key, value, strategy, **arguments):
        filled = arguments.get("key_value_seq_lengths")
        if filled is not None and "q_offset" not in arguments:
            arguments["q_offset"] = filled - query.shape[1]
        return super().attend(query, key, value, strategy, **arguments)
