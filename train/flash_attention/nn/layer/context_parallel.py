"""``RingAttention`` and ``UlyssesAttention``: ``FlashAttention`` on a sequence that is split over processes."""

import dataclasses

from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core import alibi
from flash_attention.core.config import CellConfig
from flash_attention.core.spec import NO_LIMIT
from flash_attention.nn.layer.flash_attention import discard_to_keep
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.context import context_attention
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import reject, seed_tensor


class RingAttention(SeededCell):
    r"""``FlashAttention`` over a sequence of which each rank holds a share: keys and values travel around the ring.

    Each rank gives the queries, keys and values of its own tokens, rank r those after rank r - 1's, and gets the output
    of its own queries (Liu, Zaharia and Abbeel, "Ring Attention", 2023). Values and gradients equal one device's:
    positions, windows, ALiBi, dropout and ``Sq != Sk`` count on the whole sequence. Causal work is balanced by zig-zag
    placement inside the call where a share is two equal chunks; a window needs no more hops than it reaches. Nothing of
    other ranks is kept: memory falls as 1 / ranks.

    Messages: ``flash_attention.ops.collectives``. Without ``mindspore.communication.init()`` it is one device's call.

    Args:
        head_dim (int): D.
        dropout_rate (float), prev_block_num (int), next_block_num (int), alibi (bool): as in ``FlashAttention``. Block
            windows need a multiple of ``block_size`` keys on a rank.
        causal (bool), local_window_size (int, tuple), scale (float), block_size (int), engine (str), return_lse (bool):
            keyword only; as in ``FlashAttention``.
        group (str): keyword only; the communication group; None = all processes. Default: None.

    Inputs:
        - **query** (Tensor) - (B, N, s, D), s tokens of this rank, as many on every rank; float16, bfloat16 or float32.
        - **key**, **value** (Tensor) - (B, Nkv, t, D).
        - **attention_mask** (Tensor) - **non-zero = discard**; (1|B, 1|N, 1|s, all keys): this rank's rows, all ranks'
          columns. Default: None.
        - **dropout_seed** (int, Tensor) - uint32 scalar, the same on every rank; None = as in ``FlashAttention``.
          Default: None.

    Outputs:
        Tensor (B, N, s, D), or with return_lse a pair (output, LSE float32 (B, N, s)).

    Raises:
        ValueError, TypeError: bad argument.
        UnsupportedError: the sequence cannot be split so, or the engine cannot run the parts; with the remedy.

    Supported Platforms:
        ``CPU`` (tested under msrun); ``Ascend`` (same code, not run on device)
    """

    strategy = "ring"

    def __init__(
        self,
        head_dim,
        dropout_rate=0.0,
        prev_block_num=NO_LIMIT,
        next_block_num=NO_LIMIT,
        alibi=False,
        *,
        causal=False,
        local_window_size=None,
        scale=None,
        block_size=128,
        engine=None,
        return_lse=False,
        group=None
    ):  # fmt: skip
        self_name = type(self).__name__
        config = CellConfig(
            head_dim, dropout_rate, prev_block_num, next_block_num, alibi=alibi, causal=causal,
            local_window_size=local_window_size, scale=scale, block_size=block_size, engine=engine,
            return_lse=return_lse, layer=self_name,
        )  # fmt: skip
        super().__init__(config.dropout_rate)
        ENGINES.check_name(engine, self_name)
        self.layer, self.config = self_name, dataclasses.astuple(config)
        self.return_lse, self.engine, self.group = return_lse, engine, group

    def construct(self, query, key, value, attention_mask=None, dropout_seed=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        if not isinstance(query, Tensor):
            reject(self.layer, "query", query)
        slopes, options = _prepare(self.config, self.training, query.shape)
        mask, seed = None, None
        if isinstance(attention_mask, Tensor):
            mask = discard_to_keep(attention_mask)
        elif attention_mask is not None:
            reject(self.layer, "attention_mask", attention_mask)
        if self.training and self.dropout_rate > 0:
            seed = self.next_seed(query) if dropout_seed is None else seed_tensor(self.layer, dropout_seed)
        out, lse = context_attention(
            self.layer, self.strategy, query, key, value, mask, slopes, seed, options, self.engine, self.group
        )
        if self.return_lse:
            return out, lse
        return out


class UlyssesAttention(RingAttention):
    """The same by an all-to-all that trades tokens for heads (Jacobs et al., "DeepSpeed Ulysses", 2023).

    Each rank attends with N / ranks heads over all tokens, and trades back. The ranks must divide N; key/value heads
    that they do not divide are gathered. Arguments and tensors are those of :class:`RingAttention`.
    """

    strategy = "ulysses"


@constexpr
def _prepare(config, training, shape):
    """(slopes, options) of a call whose query has ``shape``."""
    config = CellConfig(*config)
    config.check_query(shape)
    slopes = Tensor(alibi.alibi_slopes(shape[1]), mstype.float32) if config.alibi else None
    return slopes, dataclasses.astuple(config.options(training))
