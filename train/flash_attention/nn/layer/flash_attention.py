"""``FlashAttention``, the MindSpore Cell: the public contract of the package.

It translates its conventions (BNSD, mask non-zero = discard, ALiBi by a flag, dropout in training only) into one call
of the functional core; engines, plans and kernels are chosen below it.
"""

import dataclasses

from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.ops.primitive import constexpr

from flash_attention.core import alibi
from flash_attention.core.config import LAYER, CellConfig
from flash_attention.core.errors import invalid_value
from flash_attention.core.sharding import check_strategy
from flash_attention.core.spec import NO_LIMIT
from flash_attention.core.validation import check_bool
from flash_attention.nn.layer.seeded import SeededCell
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import describe, info, resolve, seed_tensor

_NAMES = ("query", "key", "value", "attention_mask", "alibi_mask") + ("",) * 8  # the rest never fails


class FlashAttention(SeededCell):
    r"""FlashAttention-2 with block-sparse windows and ALiBi.

    .. math::
        O = \text{dropout}(\text{softmax}(scale \cdot Q K^T + ALiBi + mask)) V

    computed tile by tile (Dao, "FlashAttention-2", 2023); memory is linear in the sequence length. Key ``j`` is
    visible to query ``i`` exactly when :math:`b(p) - prev \le b(j) \le b(p) + next` with :math:`p = i + S_k - S_q` and
    :math:`b(x) = \lfloor x / block\_size \rfloor`, and no other restriction hides it. A query that sees no key gives 0.

    Symbols: B batch, N heads, Nkv key/value heads (divide N), Sq, Sk lengths, D head_dim.

    Args:
        head_dim (int): D, at least 1; None = the query's. Engine limits: tik 256, aclnn 512.
        dropout_rate (float): on the softmax weights, inverted, in [0, 1); acts in training mode only. Default: 0.0.
        prev_block_num (int): visible blocks before the query's own; 65536 = no limit. Default: 65536.
        next_block_num (int): visible blocks after the query's own; 65536 = no limit. Default: 65536.
        tiling_stgy_name (str): 'sparse', 'wukong' or 'auto': the default ``block_size``, and the tiles of the Ascend
            910 kernels; the other engines choose their tiles themselves. Default: 'sparse'.
        dp (int): devices that share the batch, for (semi-)auto parallel; stand-alone runs compute the same. Default: 1.
        mp (int): devices that share the heads. Default: 1.
        have_attention_mask_batch (bool): whether the mask's batch axis is split by dp. False: it must be 1.
            Default: True.
        alibi (bool): add ALiBi; without an alibi_mask, slopes of Press et al. for all N heads. Default: False.
        causal (bool): keyword only; key j visible only when j <= p. Default: False.
        local_window_size (int, tuple): keyword only; tokens (left, right) around p, inclusive, None = no limit.
            Default: None.
        scale (float): keyword only; None = 1 / sqrt(D). Default: None.
        block_size (int): keyword only; unit of the block window and of the compact mask; None = the strategy's (128,
            'wukong' 64). Default: None.
        engine (str): keyword only; None or 'auto' = the best engine here, or a name that
            ``python -m flash_attention info`` lists. Default: None.
        return_lse (bool): keyword only; also return the log-sum-exp. Default: False.
        head_num (int): keyword only, of MindSpore's older class; N, checked against the query at each call. None =
            not checked. Default: None.
        high_precision (bool): keyword only, of the older class; either value gives float32 statistics and
            accumulation, more than the older class's True. Default: False.
        use_mqa (bool): keyword only, of the older class; True = key and value heads are not split by mp, which is
            possible with mp=1 only. How many they are is read from the key. Default: False.

    Inputs:
        - **query** (Tensor) - (B, N, Sq, D); float16, bfloat16 or float32.
        - **key** (Tensor) - (B, Nkv, Sk, D).
        - **value** (Tensor) - (B, Nkv, Sk, D).
        - **attention_mask** (Tensor) - **non-zero = discard**; (Sq, Sk), (1|B, Sq, Sk), (1|B, 1|N, Sq, Sk), or compact
          (T, T) / (1, T, T) with T = block_size: applied inside each query's own block, later blocks discarded.
          Default: None.
        - **alibi_mask** (Tensor) - (1|B, N, 1|Sq, Sk), added as it is instead of the built-in ALiBi; needs
          alibi=True. Default: None.
        - **dropout_seed** (int, Tensor) - uint32 scalar; None = ``mindspore.get_seed()`` at construction, mixed with
          the Cell's number and a counter of training calls (in a recomputed Cell: with the query). Default: None.

    Outputs:
        Tensor (B, N, Sq, D) in the query's dtype, or with return_lse a pair (output, LSE float32 (B, N, Sq)).

    Raises:
        ValueError, TypeError: bad argument, raised before any kernel is selected.
        UnsupportedError: the engine asked for cannot run this call, with the remedy.

    Supported Platforms:
        ``Ascend`` ``GPU`` ``CPU`` (what was proven where: see the support table)

    Examples:
        >>> import numpy as np
        >>> from mindspore import Tensor
        >>> from flash_attention.nn.layer.flash_attention import FlashAttention
        >>> attention = FlashAttention(head_dim=64, prev_block_num=1, next_block_num=0, causal=True)
        >>> x = Tensor(np.ones((2, 4, 300, 64), np.float32))
        >>> print(attention(x, x, x).shape)
        (2, 4, 300, 64)
    """

    def __init__(
        self,
        head_dim,
        dropout_rate=0.0,
        prev_block_num=NO_LIMIT,
        next_block_num=NO_LIMIT,
        tiling_stgy_name="sparse",
        dp=1,
        mp=1,
        have_attention_mask_batch=True,
        alibi=False,
        *,
        causal=False,
        local_window_size=None,
        scale=None,
        block_size=None,
        engine=None,
        return_lse=False,
        head_num=None,
        high_precision=False,
        use_mqa=False,
    ):
        config = CellConfig(
            head_dim,
            dropout_rate,
            prev_block_num,
            next_block_num,
            tiling_stgy_name,
            dp,
            mp,
            have_attention_mask_batch,
            alibi,
            causal=causal,
            local_window_size=local_window_size,
            scale=scale,
            block_size=block_size,
            engine=engine,
            return_lse=return_lse,
            head_num=head_num,
        )
        check_bool(LAYER, "high_precision", high_precision)
        check_bool(LAYER, "use_mqa", use_mqa)
        super().__init__(config.dropout_rate)
        ENGINES.check_name(engine, LAYER)
        self.config = dataclasses.astuple(config)  # a tuple, because a graph takes it as a constant
        self.use_mqa = use_mqa
        self._set_shards(config.dp, config.mp)
        self.strategy = None
        self.return_lse = config.return_lse
        self.engine = engine

    def construct(self, query, key, value, attention_mask=None, alibi_mask=None, dropout_seed=None):
        """Attend; shapes and meaning of the inputs are in the class's documentation."""
        training = self.training
        dropout_seed = seed_tensor(LAYER, dropout_seed)
        shapes, dtypes = describe(LAYER, _NAMES, (query, key, value, attention_mask, alibi_mask))
        mask_shape, slopes, options = _prepare(self.config, training, shapes, dtypes)
        mask = None
        if isinstance(attention_mask, Tensor):  # describe() refuses whatever is neither a Tensor nor None
            mask = discard_to_keep(attention_mask).reshape(mask_shape)
        seed = None
        if training and self.dropout_rate > 0:
            seed = self.next_seed(query) if dropout_seed is None else dropout_seed
        operands = (alibi_mask, mask, slopes, None, None, None, None, None, None, seed)
        shapes, dtypes = describe(LAYER, _NAMES, (query, key, value) + operands)
        cell = resolve(LAYER, shapes, dtypes, options, self.engine, (self.dp, self.mp))[0]
        out, lse = cell(query, key, value, *operands)
        if self.return_lse:
            return out, lse
        return out

    def shard(self, in_strategy=None, out_strategy=None):
        """Store the parallel strategy of (query, key, value[, attention_mask[, alibi_mask]]) and take dp, mp from it.

        Args:
            in_strategy (tuple): one tuple of ints an input; the query's is (dp, mp, 1, 1), the masks' as
                ``core.sharding.strategies`` computes them. None keeps dp and mp.
            out_strategy (tuple): strategy of the output, stored with it.

        Returns:
            FlashAttention, this Cell.
        """
        if in_strategy is not None:
            self._set_shards(*check_strategy(in_strategy))
        self.strategy = (in_strategy, out_strategy)
        return self

    def _set_shards(self, dp, mp):
        if self.use_mqa and mp > 1:
            remedy = "Leave use_mqa out when mp divides the key's heads; else repeat key and value to mp heads."
            raise invalid_value(LAYER, "use_mqa", "False when mp > 1 (mp splits key and value too)", "True", remedy)
        self.dp, self.mp = dp, mp


def discard_to_keep(mask):
    """The Cells' mask (non-zero = discard) as booleans that keep."""
    return ops.logical_not(mask) if mask.dtype == mstype.bool_ else mask == 0


@constexpr
def _prepare(config, training, shapes, dtypes):
    """The Cell's conventions in terms of the functional call: (mask shape, slopes, options)."""
    config = CellConfig(*config)
    infos = [None if shape is None else info(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    query, key, _, attention_mask, alibi_mask = infos
    config.check_query(query.shape)
    batch, heads, q_len = query.shape[:3]
    kv_len = key.shape[2] if len(key.shape) == 4 else q_len  # a wrong rank is reported by resolve()
    mask_shape = ()
    if attention_mask is not None:
        mask_shape = config.mask_shape(attention_mask, batch, heads, q_len, kv_len)
    slopes = None
    if alibi_mask is not None:
        config.check_alibi_mask(alibi_mask, batch, heads, q_len, kv_len)
    elif config.alibi:
        slopes = Tensor(alibi.alibi_slopes(heads), mstype.float32)
    return mask_shape, slopes, dataclasses.astuple(config.options(training))
