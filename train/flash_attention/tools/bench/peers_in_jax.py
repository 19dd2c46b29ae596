"""Attention of other JAX libraries as candidates of `in_jax`, each in a process of its own, where it is installed.

Each entry is ``peer(case) -> attend(query, key, value)`` on BSND tensors; a ValueError says what the library has not.
"""

import functools
import inspect

import jax
import jax.extend.backend
import jax.numpy as jnp

_CHUNK = 512


_OPTIONS = ("causal", "window", "blocks", "alibi", "soft_cap", "segments", "dropout", "compact")


def _require(case, *allowed):
    """Raise unless the case sets nothing but sizes, dtype and what is ``allowed`` of its options."""
    given = {name for name in _OPTIONS if getattr(case, name)}
    if given - set(allowed) or case.spec().q_len != case.spec().kv_len:
        raise ValueError("the library has no such option")


def alibi_bias(case):
    """(1, N, Sq, Sk), formed inside the jitted program."""
    spec = case.spec()
    distance = jnp.abs(jnp.arange(spec.q_len)[:, None] + spec.offset - jnp.arange(spec.kv_len)[None, :])
    return -jnp.asarray(case.operands()["alibi_slopes"])[None, :, None, None] * distance


def segment_mask(case):
    """(B, 1, Sq, Sk), formed inside the jitted program, as a careful user would."""
    given = case.operands()
    queries, keys = jnp.asarray(given["q_segment_ids"]), jnp.asarray(given["kv_segment_ids"])
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def _tokamax(case):
    _require(case, "causal", "window", "alibi", "soft_cap", "segments")
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # it reads them, also as a library
        flags.FLAGS(["bench"], known_only=True)
    options = {"is_causal": case.causal, "local_window_size": case.window, "logits_soft_cap": case.soft_cap}
    if jax.default_backend() == "cpu":  # its default there forms all scores
        options["implementation"] = "xla_chunked"

    def attend(query, key, value):
        bias = alibi_bias(case).astype(query.dtype) if case.alibi else None
        mask = segment_mask(case) if case.segments else None
        return tokamax.dot_product_attention(query, key, value, bias, mask, **options)

    return attend


def _ringattention(case):
    _require(case, "causal")
    if not hasattr(jax.lib, "xla_bridge"):  # its last release (2024) asks for the platform where jax had it then
        jax.lib.xla_bridge = jax.extend.backend
    from ringattention import ringattention

    chunk = min(_CHUNK, case.q_len)
    blockwise = {
        "causal_block_size": 1 if case.causal else None,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": chunk,
        "key_chunk_size": chunk,
        "dtype": jnp.dtype(case.dtype),
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": False,
    }
    given = {"axis_name": "sp", "float32_logits": True, "blockwise_kwargs": blockwise}
    rest = [given.get(name) for name in list(inspect.signature(ringattention).parameters)[3:]]
    mesh, whole = jax.make_mesh((1,), ("sp",), devices=jax.devices()[:1]), jax.sharding.PartitionSpec()

    def attend(query, key, value):
        key, value = (jnp.repeat(x, case.spec().group, axis=2) for x in (key, value))
        ring = jax.shard_map(
            lambda *qkv: ringattention(*qkv, *rest), mesh=mesh, in_specs=(whole,) * 3, out_specs=whole, check_vma=False
        )
        return ring(query, key, value)

    return attend


def _ejkernel(case):
    _require(case, "causal", "window")
    from ejkernel.modules import flash_attention

    options = {"causal": case.causal}
    if case.window:
        options["sliding_window"] = case.window
    if jax.default_backend() == "cpu":
        options["platform"] = "xla"
    return functools.partial(flash_attention, **options)


PEERS = {"tokamax": _tokamax, "ringattention": _ringattention, "ejkernel": _ejkernel}
