"""FlexibleAttentionModule, its records, sharding specs, KV cache and benchmark: the published names, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.mechanisms import B, D, K, N, T, draws, examples

from flash_attention.core.alibi import alibi_slopes
from flash_attention.jax import (
    AttentionBaseConfig,
    AttentionMetadata,
    AttentionOutput,
    FlaxAttentionModule,
    FlexibleAttentionModule,
    PartitionAxis,
    flash_attention,
    run_attention_benchmarks,
)
from flash_attention.jax.flexible import create_stable_sharding, make_mesh

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
BATCH = ("fsdp", "dp")


def module(mechanism="vanilla", **arguments):
    return FlexibleAttentionModule(
        num_attention_heads=N, num_kv_heads=K, head_dims=D, attn_mechanism=mechanism, **arguments
    )


def judge(**arguments):
    return flash_attention(*draws(), implementation="reference", **arguments)


def assert_same(found, wanted, atol=2e-6):
    np.testing.assert_allclose(found, wanted, atol=atol)


# --- the call -------------------------------------------------------------------------------------
def calls():
    """{name: (keywords of the call, the same for the functional call)}."""
    ex, rng = examples(), np.random.default_rng(5)
    keep = jnp.asarray(rng.random((B, T)) < 0.7)
    square = jnp.asarray(rng.random((T, T)) < 0.7)
    ids = ex["q_segment_ids"]
    filled = jnp.array([13, 24], jnp.int32)
    return {
        "causal is the default": ({}, {"is_causal": True}),
        "not causal": ({"causal": False}, {}),
        "bias": ({"bias": ex["bias"]["bias"]}, {"is_causal": True, **ex["bias"]}),
        "mask (B, S)": ({"attention_mask": keep}, {"is_causal": True, "mask": keep[:, None, None]}),
        "mask (1, T, S)": ({"attention_mask": square[None]}, {"is_causal": True, "mask": square}),
        "mask of integers": ({"attention_mask": keep.astype(int)}, {"is_causal": True, "mask": keep[:, None, None]}),
        "causal_mask": ({"causal_mask": square, "causal": False}, {"mask": square}),
        "both masks": (
            {"causal_mask": square, "attention_mask": keep, "causal": False},
            {"mask": square & keep[:, None, None]},
        ),
        "segment_ids": ({"segment_ids": ids["q_segment_ids"]}, {"is_causal": True, **ids}),
        "a pair of segment_ids": (
            {"segment_ids": tuple(ex["kv_segment_ids"][name] for name in ("q_segment_ids", "kv_segment_ids"))},
            {"is_causal": True, **ex["kv_segment_ids"]},
        ),
        "lengths that say nothing": ({"query_sequence_length": T, "key_value_sequence_length": T}, {"is_causal": True}),
        "int lengths": (
            {"query_sequence_length": 20, "key_value_sequence_length": 15},
            {"is_causal": True, "query_seq_lengths": 20, "key_value_seq_lengths": 15},
        ),
        "a cache": (
            {"uses_cache": True, "key_value_sequence_length": filled},
            {"is_causal": True, "key_value_seq_lengths": filled, "q_offset": filled - T},
        ),
        "a given offset": (
            {"uses_cache": True, "key_value_sequence_length": filled, "q_offset": 2},
            {"is_causal": True, "key_value_seq_lengths": filled, "q_offset": 2},
        ),
        "slopes": (ex["alibi_slopes"], {"is_causal": True, **ex["alibi_slopes"]}),
        "sinks": (ex["sinks"], {"is_causal": True, **ex["sinks"]}),
    }


@pytest.mark.parametrize("name", calls())
def test_call(name):
    given, same = calls()[name]
    assert_same(module()(*draws(), **given).attention_outputs, judge(**same))


STATIC = {
    "sm_scale": ({"sm_scale": 0.7}, {"scale": 0.7}),
    "local_window_size": ({"local_window_size": (5, 2)}, {"local_window_size": (5, 2)}),
    "blocks": (
        {"prev_block_num": 1, "next_block_num": 0, "block_size": 4},
        {"prev_block_num": 1, "next_block_num": 0, "block_size": 4},
    ),
    "logits_soft_cap": ({"logits_soft_cap": 1.5}, {"logits_soft_cap": 1.5}),
    "alibi": ({"alibi": True}, {"alibi_slopes": jnp.asarray(alibi_slopes(N))}),
    "attention_dropout": ({"attention_dropout": 0.4}, {}),  # deterministic by default
    "blocksizes": ({"blocksize_q": 8, "blocksize_k": 16, "blocksize_b": 1}, {}),
    "scan_ring_attention": ({"scan_ring_attention": False}, {}),
    "shard_attention_computation": ({"shard_attention_computation": False}, {}),
    "use_sharding_constraint": ({"use_sharding_constraint": True}, {}),
    "axis_name": ({"axis_name": "tokens"}, {}),
    "partition_axis": ({"partition_axis": PartitionAxis(head_axis=None)}, {}),
    "platform, backend": ({"platform": "jax", "backend": "cpu"}, {}),
    "backward_pass_impl": ({"backward_pass_impl": "xla"}, {}),
    "force_float32_tpu": ({"force_float32_tpu": False}, {}),
    "precision": ({"precision": "highest"}, {}),
    "scan_attention_layers": ({"scan_attention_layers": False}, {}),
}


@pytest.mark.parametrize("name", STATIC)
def test_constructor(name):
    given, same = STATIC[name]
    assert_same(module(**given)(*draws(), causal=False).attention_outputs, judge(**same))


def test_dropout_of_the_module():
    layer = module(attention_dropout=0.4)
    rng = jax.random.key(3)
    out = layer(*draws(), deterministic=False, dropout_rng=rng).attention_outputs
    seed = jax.random.bits(rng, (), "uint32")
    assert_same(out, judge(is_causal=True, dropout_rate=0.4, dropout_seed=seed))


def test_dtype_and_precision():
    layer = module(dtype=jnp.bfloat16, precision="high")
    assert layer(*draws()).attention_outputs.dtype == jnp.bfloat16
    traced = jax.make_jaxpr(lambda *qkv: module("flash_attn2", precision="highest")(*qkv).attention_outputs)(*draws())
    assert "HIGHEST" in str(traced)
    on_tpu = module(dtype=jnp.bfloat16, backend="tpu")
    assert on_tpu.impl.metadata.runtime_dtype == jnp.float32
    assert on_tpu(*draws()).attention_outputs.dtype == jnp.bfloat16
    kept = module(dtype=jnp.bfloat16, backend="tpu", force_float32_tpu=False)
    assert kept.impl.metadata.runtime_dtype == jnp.bfloat16


BAD = {
    "'num_kv_heads' must be a divisor of num_attention_heads = 4": {"num_kv_heads": 3},
    "'num_attention_heads' must be left out when num_q_heads is given": {"num_q_heads": 4},
    "'scan_attention_layers' must be False": {"scan_attention_layers": True},
    "'backward_pass_impl' must be 'triton' or 'xla'": {"backward_pass_impl": "cuda"},
    "'platform' must be None or 'jax', but got 'triton'": {"platform": "triton"},
    "'backend' must be one of": {"backend": "npu"},
    "'blocksize_b' must be an int in .1, 1., but got 2": {"blocksize_b": 2},
    "'attn_mechanism' must be one of": {"attn_mechanism": "no"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_constructor(message):
    arguments = dict({"num_attention_heads": N, "head_dims": D}, **BAD[message])
    with pytest.raises(ValueError, match=message):
        FlexibleAttentionModule(**arguments)


def test_bad_call():
    query, key, value = draws()
    with pytest.raises(ValueError, match=r"'query_states' must be of shape \(B, T, 4, 8\)"):
        module()(query[..., :4], key, value)
    with pytest.raises(ValueError, match="'segment_ids' must be a pair"):
        module()(query[:, :3], key, value, segment_ids=jnp.zeros((B, T), jnp.int32))
    with pytest.raises(ValueError, match=r"'key_value_sequence_length' must be an int in \[0, 24\]"):
        module()(query, key, value, key_value_sequence_length=25)
    for name in ("attention_mask", "causal_mask"):
        with pytest.raises(ValueError, match="'{}' must be boolean or >= 0.*bias=".format(name)):
            module()(query, key, value, **{name: jnp.full((B, 1, 1, T), -1e9)})
    with pytest.raises(TypeError, match="'uses_cache' must be a bool"):
        module()(query, key, value, uses_cache=1)


def test_defaults_come_from_the_config():
    config = AttentionBaseConfig(
        block_q=32, attn_dtype=jnp.bfloat16, attn_mechanism="blockwise", axis_dims=(1, 1, 1, -1)
    )
    for name in ("base_config", "base_module_class"):
        layer = FlexibleAttentionModule(num_q_heads=N, head_dims=D, **{name: config})
        assert layer.attn_mechanism == "blockwise" and layer.dtype == jnp.bfloat16 and layer.num_kv_heads == N
        assert layer.metadata.blocksize_q == 32 and layer.metadata.blocksize_k == 128
        assert layer.metadata.mesh == config.mesh
    plain = module()
    assert (plain.metadata.blocksize_q, plain.metadata.blocksize_k, plain.metadata.blocksize_b) == (64, 128, 1)
    assert FlexibleAttentionModule(num_q_heads=N, head_dims=D).attn_mechanism == "vanilla"


# --- records --------------------------------------------------------------------------------------
def test_output_is_a_pytree_and_a_record():
    out = module()(*draws())
    assert len(jax.tree.leaves(out)) == 2 and len(jax.tree.leaves(out.replace(attention_weights=None))) == 1
    assert isinstance(jax.jit(lambda x: x)(out), AttentionOutput)
    half = out.replace(attention_outputs=out.attention_outputs.astype(jnp.bfloat16))
    for again in (AttentionOutput.from_dict(half.to_dict()), AttentionOutput.from_json(half.to_json())):
        assert again.attention_outputs.dtype == jnp.bfloat16
        assert (again.attention_outputs == half.attention_outputs).all()
        assert (again.attention_weights == half.attention_weights).all()


def test_metadata_is_a_record():
    config = AttentionBaseConfig(block_q=32, scan_ring_attention=False)
    metadata = AttentionMetadata.from_config(config, softmax_scale=0.3, dropout_prob=0.2)
    assert metadata.blocksize_q == 32 and metadata.blocksize_k == 128 and not metadata.scan_ring_attention
    assert metadata.softmax_scale == 0.3 and metadata.dropout_prob == 0.2
    for again in (AttentionMetadata.from_dict(metadata.to_dict()), AttentionMetadata.from_json(metadata.to_json())):
        assert again == metadata and hash(again) == hash(metadata)
    assert metadata.replace(blocksize_q=16).blocksize_q == 16
    with pytest.raises(TypeError):
        metadata.replace(block=16)
    scaled = jax.jit(lambda metadata, x: x * metadata.softmax_scale, static_argnums=0)
    assert scaled(metadata, 10.0) == 3.0
    bare = AttentionMetadata(mesh=config.mesh)
    assert (bare.blocksize_q, bare.blocksize_k, bare.sequence_axis_name) == (512, 1024, "sp")
    assert bare.runtime_softmax_dtype == jnp.float32 and bare.softmax_scale is None and bare.scan_ring_attention
    with pytest.raises(ValueError, match="'mesh' must be given when there is no base_config"):
        AttentionMetadata()
    with pytest.raises(ValueError, match="'runtime_softmax_dtype' must be float32"):
        bare.replace(runtime_softmax_dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="'partition_manager' must be None, a number"):
        bare.replace(partition_manager=object()).to_json()


def test_set_attrs_carefully():
    class More(AttentionMetadata):
        def __post_init__(self):
            super().__post_init__()
            self.set_attrs_carefully("extra", 1)
            self.set_attrs_carefully("extra", 2)
            self.set_attrs_carefully("tile", 3, pickup_name="block_q")
            self.set_attrs_carefully("other", 4, pickup_name="block_q", use_base_config=False)

    more = More(base_config=AttentionBaseConfig(block_q=32))
    assert (more.extra, more.tile, more.other) == (1, 32, 4)


# --- sharding -------------------------------------------------------------------------------------
def test_get_shardings():
    metadata = AttentionMetadata(base_config=AttentionBaseConfig())
    query, key, bias = P(BATCH, "sp", "tp", None), P(BATCH, "sp", None, None), P(BATCH, None, "sp", None)
    for mode in ("__train__", "__prefill__"):
        assert metadata.get_shardings(mode) == (query, key, key, bias, bias, query)
    assert metadata.get_shardings("__train__", qkv_mni_sharding=True)[1] == query
    swapped = metadata.get_shardings("__train__", BTHD=False)
    assert swapped[0] == P(BATCH, "tp", "sp", None) and swapped[1] == P(BATCH, None, "sp", None)
    for mode in ("__autoregressive__", "__insert__"):
        query, key, _, bias, mask, out = metadata.get_shardings(mode, qkv_mni_sharding=True)
        assert query == out == P(BATCH, None, "tp", None) and key == P(BATCH, "sp", "tp", None)
        assert bias == mask == P(BATCH, None, None, None)
    unsharded = AttentionMetadata(base_config=AttentionBaseConfig(use_sharded_kv_caching=False))
    assert unsharded.get_shardings("__insert__")[1] == P(BATCH, None, None, None)
    with pytest.raises(ValueError, match="'mode' must be one of"):
        metadata.get_shardings("__test__")


def test_partition_specs_of_the_module():
    layer = module()
    query, key, value, bias, out, generating = layer.get_bshd_partition_specs(8)
    assert not generating and query == out == key == value == P(BATCH, "sp", "tp", None)
    assert bias == P(BATCH, None, "sp", None) and layer.get_bshd_partition_specs(8, True)[3] == P(
        BATCH, "tp", "sp", None
    )
    query, key, _, bias, out, generating = layer.get_bhsd_partition_specs(1)
    assert generating and query == out == P(BATCH, "tp", None, None) and key == P(BATCH, "tp", "sp", None)
    assert bias == P(BATCH, None, None, None)


def test_create_stable_sharding():
    spec = P(BATCH, "sp", "tp", None)
    assert create_stable_sharding(spec, dep=None) is None and create_stable_sharding(None) is None
    assert create_stable_sharding(spec) == spec
    assert create_stable_sharding(spec, [0, -2]) == P(BATCH, None, "tp", None)
    assert create_stable_sharding(spec, [1], P("dp", "tp", None, None)) == P(None, "tp", None, None)
    with pytest.raises(IndexError):
        create_stable_sharding(spec, [4])
    mesh = jax.sharding.AbstractMesh((2, 4, 2), ("dp", "fsdp", "tp"))
    assert create_stable_sharding(spec, tensor=np.zeros((8, 6, 4)), mesh=mesh) == P(("fsdp", "dp"), None, "tp")
    assert create_stable_sharding(spec, tensor=np.zeros((4, 6, 3, 8)), mesh=mesh) == P("fsdp", None, None, None)


def test_make_mesh():
    assert make_mesh((1, -1, 1, 1)).shape["fsdp"] == jax.device_count()
    for dims in ((1, -1, -1, 1), (1, 7, 1, 1), (1, 1, 1), (0, -1, 1, 1)):
        with pytest.raises(ValueError, match="'axis_dims' must be 4 sizes"):
            make_mesh(dims)


# --- the cache ------------------------------------------------------------------------------------
def test_kv_cache_gives_what_the_whole_sequence_gives():
    query, key, value = draws()
    base, layer = FlaxAttentionModule(N, D, K), module("flash_attn2")
    cache, want = base.init_cache(B, 32), judge(is_causal=True)

    @jax.jit
    def step(cache, query, key, value):
        key, value, mask, cache = base._concatenate_to_cache(cache, query, key, value)
        masked = layer(query, key, value, attention_mask=mask, causal=False)
        filled = jnp.broadcast_to(cache.cache_index, (B,))
        skipped = layer(query, key, value, uses_cache=True, key_value_sequence_length=filled)
        return cache, masked.attention_outputs, skipped.attention_outputs

    for start, stop in ((0, 20), (20, 21), (21, 24)):
        part = slice(start, stop)
        cache, masked, skipped = step(cache, query[:, part], key[:, part], value[:, part])
        assert_same(masked, want[:, part])
        assert_same(skipped, want[:, part])
    assert int(cache.cache_index) == T
    with pytest.raises(ValueError, match="at most the 8 tokens left in the cache"):
        base._concatenate_to_cache(cache, query[:, :9], key[:, :9], value[:, :9])
    *_, mask, _ = base._concatenate_to_cache(
        base.init_cache(B, 8), query[:, :2], key[:, :2], value[:, :2], jnp.eye(2, 8)
    )
    assert mask.tolist() == [[[[True] + [False] * 7] * 2], [[[False] * 8, [False, True] + [False] * 6]]]


def test_heads():
    base = FlaxAttentionModule(N, D, K)
    x = jnp.arange(2 * 3 * N * D).reshape(2, 3, N * D)
    assert base._split_heads(x).shape == (2, 3, N, D) and (base._merge_heads(base._split_heads(x)) == x).all()
    key, _ = base.repeat_key_value(jnp.arange(2.0).reshape(1, 1, 2, 1), jnp.zeros((1, 1, 2, 1)), 2)
    assert key.ravel().tolist() == [0, 0, 1, 1]


# --- the benchmark --------------------------------------------------------------------------------
def test_benchmark(tmp_path):
    table = run_attention_benchmarks(
        axis_dims=(1, 1, 1, -1), sequence_length=48, batch_size=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, chunk_size=16, test_attentions=["vanilla", "blockwise", "cudnn"], rounds=2,
    )  # fmt: skip
    vanilla, blockwise, cudnn = table
    assert [row.status for row in table] == ["passed", "passed", "refused"]
    assert blockwise.mean_s > 0 and blockwise.memory_bytes > 0 and 0 < blockwise.dk < 1e-4 and vanilla.difference < 1e-5
    assert "NVIDIA GPU" in cudnn.error and "refused" in str(table) and len(str(table).splitlines()) == 4
    table.plot(tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 1000


def test_benchmark_finds_a_wrong_mechanism():
    from flash_attention.jax import AttentionImpl, AttentionRegistry

    @AttentionRegistry.register
    class Wrong(AttentionImpl):
        names = "wrong"

        def forward_native(self, query, key, value, *, is_causal=False):
            return AttentionOutput(attention_outputs=flash_attention(query, key, value))

    try:
        forward = {"calculate_gradients": False, "num_attention_heads": 1, "head_dim": 8, "rounds": 1}
        (row,) = run_attention_benchmarks([1], [16], ["wrong"], **forward)
    finally:
        AttentionRegistry.unregister("wrong")
    assert row.status == "FAILED" and row.difference > 0.1 and row.dq is None
    with pytest.raises(ValueError, match="'test_attentions' must be left out when attention_types is given"):
        run_attention_benchmarks(attention_types=["vanilla"], test_attentions=["vanilla"])
