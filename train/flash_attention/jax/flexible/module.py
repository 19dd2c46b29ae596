"""FlexibleAttentionModule: any mechanism behind one constructor and one call.

user call -> normalised keywords of ``flash_attention.jax.flash_attention`` -> :class:`AttentionImpl` by name.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flash_attention.core.alibi import alibi_slopes as slopes_of
from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.spec import NO_LIMIT
from flash_attention.core.validation import check_bool, check_int, is_int
from flash_attention.jax.flexible.config import pick
from flash_attention.jax.flexible.metadata import AttentionMetadata
from flash_attention.jax.flexible.partition import AUTOREGRESSIVE, TRAIN, create_stable_sharding, swapped
from flash_attention.jax.flexible.registry import AttentionImpl, AttentionRegistry
from flash_attention.jax.functional import checked_mask

LAYER = "FlexibleAttentionModule"


class FlexibleAttentionModule:
    """An attention layer without parameters whose mechanism is chosen by name.

    Symbols: B batch, T queries, S keys, N heads, K key/value heads (divide N), D head_dim. ``...`` as a value means:
    from ``base_config``, else the default.

    Args:
        mesh: ``jax.sharding.Mesh``; default ``base_config.mesh``, else one device.
        sm_scale: factor on the scores, default ``head_dims ** -0.5``.
        num_kv_heads: K, default N.
        num_q_heads: N; ``num_attention_heads`` is the same argument.
        head_dims: D.
        attn_mechanism: a name of ``AttentionRegistry``; default 'sdpa' on a GPU, else 'vanilla'.
        blocksize_q, blocksize_k: compute tile of 'blockwise' (default 64 and 128); other mechanisms choose their own. A
            tile never changes a result beyond rounding.
        blocksize_b: batch rows a step; must be 1.
        partition_axis: :class:`PartitionAxis`, default its defaults.
        scan_ring_attention: the hops of 'ring' in one loop (default) or one after the other.
        scan_attention_layers: must be False: this is one call; scan over your layers with ``jax.lax.scan``.
        attention_dropout: probability of dropping a softmax weight, when called with deterministic=False.
        dtype: of the computation and the output, default float32; statistics are float32 always.
        precision: of matrix products, as ``jax.default_matmul_precision`` takes it; default 'fastest'.
        force_float32_tpu: on a TPU compute in float32 whatever ``dtype`` is (the output has ``dtype``); default True.
        shard_attention_computation: on several devices each computes its own part (default), see AttentionMetadata.
        use_sharding_constraint: pin query, key, value and output to the mesh by ``partition_axis``; default False.
        axis_name: mesh axis of the sequence, default 'sp'.
        platform: None or 'jax'.
        backend: where it runs, see AttentionMetadata.
        backward_pass_impl: 'triton' or 'xla': names of another package's kernels; each mechanism here has one backward,
            which both stand for.
        base_config: source of defaults; ``base_module_class`` is the same argument.
        local_window_size, prev_block_num, next_block_num, block_size, logits_soft_cap: of every call, as in
            ``flash_attention.jax.flash_attention``.
        alibi: add ALiBi with the slopes of Press et al. for N heads.
        segment_size, dilation_rate: of 'dilated', ints or sequences of them, as in
            ``flash_attention.jax.dilated_attention``; None for every other mechanism.

    Raises:
        ValueError, TypeError: bad argument, in MindSpore's wording.
    """

    def __init__(
        self,
        mesh=...,
        sm_scale=None,
        num_kv_heads=None,
        num_q_heads=None,
        head_dims=None,
        attn_mechanism=...,
        blocksize_k=...,
        blocksize_q=...,
        blocksize_b=...,
        partition_axis=...,
        scan_ring_attention=...,
        scan_attention_layers=...,
        attention_dropout=0.0,
        dtype=...,
        precision=...,
        force_float32_tpu=...,
        shard_attention_computation=...,
        use_sharding_constraint=...,
        axis_name=...,
        platform=...,
        backend=...,
        backward_pass_impl="triton",
        base_config=None,
        *,
        num_attention_heads=None,
        base_module_class=None,
        local_window_size=None,
        prev_block_num=NO_LIMIT,
        next_block_num=NO_LIMIT,
        block_size=128,
        logits_soft_cap=None,
        alibi=False,
        segment_size=None,
        dilation_rate=None,
    ):
        config = _one_of("base_config", base_config, "base_module_class", base_module_class)
        heads = _one_of("num_q_heads", num_q_heads, "num_attention_heads", num_attention_heads)

        def given(name, value, default):
            return pick(config, name, default) if value is ... else value

        self.base_config = config
        self.num_q_heads = check_int(LAYER, "num_attention_heads", heads, 1)
        self.num_kv_heads = check_int(LAYER, "num_kv_heads", heads if num_kv_heads is None else num_kv_heads, 1)
        if self.num_q_heads % self.num_kv_heads:
            need = "a divisor of num_attention_heads = {}".format(heads)
            raise invalid_value(LAYER, "num_kv_heads", need, self.num_kv_heads)
        self.head_dims = check_int(LAYER, "head_dims", head_dims, 1)
        self.dtype = jnp.dtype(given("dtype", dtype, jnp.float32) or jnp.float32)
        self.precision = jax.lax.Precision(given("precision", precision, "fastest"))
        self.use_sharding_constraint = given("use_sharding_constraint", use_sharding_constraint, False)
        self.force_float32_tpu = given("force_float32_tpu", force_float32_tpu, True)
        self.alibi = check_bool(LAYER, "alibi", alibi)
        for name in ("use_sharding_constraint", "force_float32_tpu"):
            check_bool(LAYER, name, getattr(self, name))
        if given("scan_attention_layers", scan_attention_layers, False):
            remedy = "This is one attention call; scan over your layers with jax.lax.scan."
            raise invalid_value(LAYER, "scan_attention_layers", "False", True, remedy)
        if backward_pass_impl not in ("triton", "xla"):
            raise invalid_value(LAYER, "backward_pass_impl", "'triton' or 'xla'", repr(backward_pass_impl))
        default = "sdpa" if jax.default_backend() == "gpu" else "vanilla"
        self.attn_mechanism = given("attn_mechanism", attn_mechanism, default)
        self._static = {
            "local_window_size": local_window_size,
            "prev_block_num": prev_block_num,
            "next_block_num": next_block_num,
            "block_size": block_size,
            "logits_soft_cap": logits_soft_cap,
        }
        self.metadata = AttentionMetadata(
            runtime_dtype=self.dtype,
            sequence_axis_name=axis_name,
            mesh=_default_mesh() if mesh is None or (mesh is ... and config is None) else mesh,
            platform=platform,
            backend=backend,
            partition_axis=partition_axis,
            base_config=config,
            scan_ring_attention=scan_ring_attention,
            shard_attention_computation=shard_attention_computation,
            softmax_scale=sm_scale,
            dropout_prob=attention_dropout,
            blocksize_q=given("blocksize_q", blocksize_q, 64),
            blocksize_k=given("blocksize_k", blocksize_k, 128),
            blocksize_b=given("blocksize_b", blocksize_b, 1),
            segment_size=segment_size,
            dilation_rate=dilation_rate,
        )
        self.impl = AttentionRegistry.create(self.attn_mechanism, self.metadata)
        if self.force_float32_tpu and self.impl.current_backend() == "tpu":
            self.impl.metadata = self.metadata.replace(runtime_dtype=jnp.float32)

    def __call__(
        self,
        query_states,
        key_states,
        value_states,
        query_sequence_length=None,
        key_value_sequence_length=None,
        bias=None,
        attention_mask=None,
        segment_ids=None,
        causal=True,
        deterministic=True,
        dropout_rng=None,
        uses_cache=False,
        causal_mask=None,
        *,
        alibi_slopes=None,
        sinks=None,
        q_offset=None,
    ):
        """Attend.

        Args:
            query_states: (B, T, N, D); key_states, value_states: (B, S, K, D).
            query_sequence_length, key_value_sequence_length: int or int (B,): rows and keys from there on are padding.
            bias: float, broadcastable to (B, N, T, S), added to the scores; differentiable.
            attention_mask: **keep where True or > 0**; (B, S), (1|B, 1|T, S) or (1|B, 1|N, 1|T, 1|S).
            segment_ids: int (B, T) of queries and keys alike, or a pair (B, T), (B, S).
            causal: key j is visible to query i only when ``j <= i + S - T`` (bottom-right).
            deterministic: False = training: ``attention_dropout`` acts, with the key ``dropout_rng``.
            uses_cache: the keys are a cache of which ``key_value_sequence_length`` are filled; the last query stands at
                the last of those.
            causal_mask: a second keep mask, (T, S) or (1|B, 1|N, 1|T, 1|S), ANDed with all else.
            alibi_slopes, sinks, q_offset: as in ``flash_attention.jax.flash_attention``.

        Returns:
            :class:`AttentionOutput`: ``attention_outputs`` (B, T, N, D) of ``dtype``; ``attention_weights``
            (B, N, T, S) from the mechanisms that form them, else None.

        Raises:
            UnsupportedError: the mechanism cannot honour an argument; the message says why and what can.
        """
        self._check_shapes(query_states, key_states)
        check_bool(LAYER, "uses_cache", uses_cache)
        check_bool(LAYER, "causal", causal)
        q_len, kv_len = query_states.shape[1], key_states.shape[1]
        if self.alibi and alibi_slopes is None:
            alibi_slopes = slopes_of(self.num_q_heads)
        filled = _length("key_value_sequence_length", key_value_sequence_length, kv_len)
        if uses_cache and filled is not None and q_offset is None:
            q_offset = filled - q_len
        q_ids, kv_ids = _segments(segment_ids, q_len, kv_len)
        query_states, key_states, value_states = self._pinned(query_states, key_states, value_states)
        with jax.default_matmul_precision(self.precision.name.lower()):
            result = self.impl(
                query_states,
                key_states,
                value_states,
                deterministic=deterministic,
                dropout_rng=dropout_rng,
                bias=bias,
                mask=_keep_mask(attention_mask, causal_mask),
                is_causal=causal,
                query_seq_lengths=_length("query_sequence_length", query_sequence_length, q_len),
                key_value_seq_lengths=filled,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                q_segment_ids=q_ids,
                kv_segment_ids=kv_ids,
                q_offset=q_offset,
                **self._static,
            )
        (out,) = self._pinned(result.attention_outputs)
        return result.replace(attention_outputs=out.astype(self.dtype))

    def get_bshd_partition_specs(self, query_sequence_length, bias_dim_eql=False):
        """PartitionSpecs (query, key, value, bias, output) and whether they are those of decoding (length 1).

        ``bias_dim_eql``: the bias has a value a head, and is sharded as the heads are.
        """
        generating = query_sequence_length == 1
        mode = AUTOREGRESSIVE if generating else TRAIN
        query, key, bias = self.metadata.partition_axis.specs(mode, bias_dim_eql)
        return query, key, key, bias, query, generating

    def get_bhsd_partition_specs(self, query_sequence_length, bias_dim_eql=False):
        """The same for (B, N, T, D) tensors."""
        query, key, value, bias, out, generating = self.get_bshd_partition_specs(query_sequence_length, bias_dim_eql)
        return swapped(query), swapped(key), swapped(value), bias, swapped(out), generating

    @staticmethod
    def repeat_kv_heads(key, value, num_reps):
        """(B, S, K, D) -> (B, S, K * num_reps, D), each head repeated in place."""
        return jnp.repeat(key, num_reps, axis=2), jnp.repeat(value, num_reps, axis=2)

    def _check_shapes(self, query, key):
        for name, x, heads in (("query_states", query, self.num_q_heads), ("key_states", key, self.num_kv_heads)):
            if jnp.ndim(x) != 4 or x.shape[2:] != (heads, self.head_dims):
                need = "of shape (B, T, {}, {})".format(heads, self.head_dims)
                raise invalid_value(LAYER, name, need, "shape {}".format(tuple(jnp.shape(x))))

    def _pinned(self, *tensors):
        """The tensors with their layout on the mesh pinned, when asked for."""
        if not self.use_sharding_constraint:
            return tensors
        specs = self.get_bshd_partition_specs(tensors[0].shape[1])
        mesh = self.metadata.mesh
        return tuple(
            jax.lax.with_sharding_constraint(x, NamedSharding(mesh, create_stable_sharding(spec, tensor=x, mesh=mesh)))
            for x, spec in zip(tensors, specs)
        )


def _default_mesh():
    """One device, with the axis names that PartitionAxis expects."""
    return jax.sharding.Mesh([[[[jax.devices()[0]]]]], ("dp", "fsdp", "tp", "sp"))


def _one_of(name, value, other, alias):
    if value is not None and alias is not None:
        raise invalid_value(LAYER, other, "left out when {} is given (they are the same argument)".format(name), alias)
    return alias if value is None else value


def _length(name, value, full):
    """A length argument for the core call; an int that says nothing new becomes None."""
    if not is_int(value):
        return value
    check_int(LAYER, name, value, 0, full)
    return None if value == full else int(value)


def _keep_mask(attention_mask, causal_mask):
    checked_mask(LAYER, attention_mask, "attention_mask")
    checked_mask(LAYER, causal_mask, "causal_mask")
    if attention_mask is not None:
        rank = jnp.ndim(attention_mask)
        if rank not in (2, 3, 4):
            raise invalid_value(LAYER, "attention_mask", "of rank 2, 3 or 4", "rank {}".format(rank))
        attention_mask = jnp.asarray(attention_mask)
        attention_mask = {2: lambda x: x[:, None, None], 3: lambda x: x[:, None], 4: lambda x: x}[rank](attention_mask)
    if causal_mask is None:
        return attention_mask
    return AttentionImpl.combine_masks(attention_mask, causal_mask)


def _segments(segment_ids, q_len, kv_len):
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, (tuple, list)):
        if len(segment_ids) != 2:
            raise invalid_type(
                LAYER, "segment_ids", "an array or a pair of arrays", "{} items".format(len(segment_ids))
            )
        return tuple(segment_ids)
    if q_len != kv_len:
        need = "a pair (of queries, of keys) when their lengths differ"
        raise invalid_value(LAYER, "segment_ids", need, "one array")
    return segment_ids, segment_ids
