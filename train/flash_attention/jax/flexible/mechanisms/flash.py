"""Mechanisms that are the blockwise core call with something fixed: 'flash_attn2', 'blockwise', 'triangle', 'local',
'autoregressive'."""

from flash_attention.core.errors import Reason
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry, output_of
from flash_attention.jax.functional import attend, call_of, flash_attention


@AttentionRegistry.register
class FlashAttention2(AttentionImpl):
    """FlashAttention-2 (Dao, 2023): exact, memory linear in the lengths; takes every argument."""

    names = ("flash_attn2", "flash")

    def forward_native(self, query, key, value, **arguments):
        return output_of(self.attend(query, key, value, **arguments))

    def attend(self, query, key, value, **arguments):
        """The core call, on one device or on the mesh."""
        return flash_attention(query, key, value, implementation="xla", **arguments)


@AttentionRegistry.register
class Blockwise(FlashAttention2):
    """The same with compute tiles of exactly ``blocksize_q`` x ``blocksize_k``, the chunks of Liu and Abbeel (2023)."""

    names = "blockwise"

    def attend(self, query, key, value, **arguments):
        tile = (self.metadata.blocksize_q, self.metadata.blocksize_k)
        return attend(self.get_impl_name(), query, key, value, *call_of(tile=tile, **arguments), "xla")[0]


@AttentionRegistry.register
class Triangle(FlashAttention2):
    """Causal attention that computes only the lower triangle of blocks: as many queries as keys."""

    names = "triangle"

    def supports(self, query, key, value, arguments):
        if not arguments.get("is_causal"):
            return Reason("causal", False, "True (it computes the lower triangle)", "Use 'flash_attn2'.")
        if query.shape[1] != key.shape[1]:
            lengths = "{} and {}".format(query.shape[1], key.shape[1])
            return Reason("sequence length", lengths, "equal for queries and keys", "Use 'flash_attn2'.")
        return None


@AttentionRegistry.register
class Local(FlashAttention2):
    """Attention within a window of tokens (``local_window_size``) or of blocks (``prev_block_num``, ...)."""

    names = "local"

    def supports(self, query, key, value, arguments):
        if not {"local_window_size", "prev_block_num", "next_block_num"} & set(arguments):
            need = "given, or prev_block_num or next_block_num"
            return Reason("local_window_size", None, need, "Use 'flash_attn2' for attention without a window.")
        return None


@AttentionRegistry.register
class Autoregressive(FlashAttention2):
    """Decoding: few queries at the end of the cached keys; ``key_value_seq_lengths`` says how many are filled.

    Unless ``q_offset`` is given, the last query stands at the last filled key.
    """

    names = "autoregressive"

    def attend(self, query, key, value, **arguments):
        filled = arguments.get("key_value_seq_lengths")
        if filled is not None and "q_offset" not in arguments:
            arguments["q_offset"] = filled - query.shape[1]
        return super().attend(query, key, value, **arguments)
