"""``FlashAttention`` in JAX: the twin of the MindSpore Cell, same constructor, same call, same conventions."""

import jax
import jax.numpy as jnp

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.config import LAYER, CellConfig
from flash_attention.core.errors import Reason, invalid_value
from flash_attention.core.spec import NO_LIMIT, Operands
from flash_attention.core.validation import check_bool
from flash_attention.jax.engines import ENGINES
from flash_attention.jax.functional import attend, describe


class FlashAttention:
    """FlashAttention-2 with block-sparse windows and ALiBi, layout BNSD, mask **non-zero = discard**.

    Symbols: B batch, N heads, Nkv key/value heads (divide N), S sequence, D head_dim.

    Args:
        head_dim: D, at least 1; None = the query's.
        dropout_rate: on the softmax weights, inverted, in [0, 1); acts only when called with deterministic=False.
        prev_block_num, next_block_num: blocks visible before and after the query's own; 65536 = no limit.
        tiling_stgy_name: 'sparse', 'wukong' or 'auto'; decides the default ``block_size`` (the JAX engines choose
            their tiles themselves).
        dp, mp: must be 1 here: this class computes on whatever its inputs are sharded over.
        have_attention_mask_batch: False forbids a mask with a batch axis above 1.
        alibi: add ALiBi; with no alibi_mask given, slopes of Press et al. for N heads.
        causal, local_window_size, scale: as in :func:`flash_attention.jax.flash_attention`.
        block_size: unit of the block window and of the compact mask; default the strategy's (128, 'wukong' 64).
        engine: None or 'auto', 'xla', 'pallas', 'mosaic', 'cudnn', 'splash', 'reference'.
        return_lse: also return the LSE, float32 (B, N, Sq).

    Raises:
        ValueError, TypeError: bad argument, in MindSpore's wording.
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
    ):
        self.config = CellConfig(
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
        )
        ENGINES.check_name(engine, LAYER, "engine")
        for name in ("dp", "mp"):
            if getattr(self.config, name) != 1:
                remedy = "Shard the inputs with jax.sharding; the call follows them."
                raise Reason(name, getattr(self.config, name), "1 in JAX", remedy).error(LAYER)

    def __call__(
        self,
        query,
        key,
        value,
        attention_mask=None,
        alibi_mask=None,
        *,
        deterministic=True,
        dropout_seed=None,
        dropout_rng=None,
    ):
        """Attend.

        Args:
            query: (B, N, Sq, D); key, value: (B, Nkv, Sk, D).
            attention_mask: **non-zero = discard**; (Sq, Sk), (1|B, Sq, Sk), (1|B, 1|N, Sq, Sk), or compact (T, T) /
                (1, T, T) with T = block_size: applied inside each query's own block, later blocks discarded.
            alibi_mask: (1|B, N, 1|Sq, Sk), added as it is instead of the built-in ALiBi; needs alibi=True.
            deterministic: False = training: dropout acts.
            dropout_seed: uint32 scalar, or give ``dropout_rng``, a PRNG key it is drawn from.

        Returns:
            (B, N, Sq, D) in the query's dtype, or with return_lse a pair (output, LSE (B, N, Sq) float32).
        """
        check_bool(LAYER, "deterministic", deterministic)
        config = self.config
        options = config.options(training=not deterministic)
        config.check_query(jnp.shape(query))
        batch, heads, q_len, _ = jnp.shape(query)
        kv_len = jnp.shape(key)[2] if jnp.ndim(key) == 4 else q_len  # a wrong rank is reported by attend()
        mask = slopes = None
        if attention_mask is not None:
            shape = config.mask_shape(describe(attention_mask), batch, heads, q_len, kv_len)
            mask = (jnp.asarray(attention_mask) == 0).reshape(shape)
        if alibi_mask is not None:
            config.check_alibi_mask(describe(alibi_mask), batch, heads, q_len, kv_len)
        elif config.alibi:
            slopes = alibi_slopes(heads)
        seed = self._seed(dropout_seed, dropout_rng)
        operands = Operands(bias=alibi_mask, mask=mask, slopes=slopes, dropout_seed=seed)
        out, lse = attend(LAYER, query, key, value, operands, options, config.engine, with_lse=config.return_lse)
        return (out, lse) if config.return_lse else out

    @staticmethod
    def _seed(seed, rng):
        if seed is not None and rng is not None:
            raise invalid_value(LAYER, "dropout_rng", "None when dropout_seed is given", "a key")
        return seed if rng is None else jax.random.bits(rng, (), "uint32")
