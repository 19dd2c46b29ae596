"""Attention over 8 forced CPU devices, in a process of its own: prints one JSON line {name: result} a case.

python many_devices.py NAME ...     (`test_distributed.py` starts it; XLA_FLAGS must force 8 devices)
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.core.alibi import alibi_slopes
from flash_attention.jax import flash_attention
from flash_attention.jax.distributed import attention, explain, make_mesh, volume

DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")
DIMS = {
    "sp4 tp2": (1, 1, 2, 4),
    "sp8": (1, 1, 1, 8),
    "dp2 sp4": (2, 1, 1, 4),
    "tp4 sp2": (1, 1, 4, 2),
    "dp2 tp2 sp2": (2, 1, 2, 2),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0):
    return jnp.asarray(rng(seed).standard_normal(shape), jnp.float32)


def ids(batch, *lengths):
    """Sorted segment ids for queries and keys."""
    found = [jnp.asarray(np.sort(rng(3).integers(0, 3, (batch, n)), axis=1), jnp.int32) for n in lengths]
    return {"q_segment_ids": found[0], "kv_segment_ids": found[-1]}


def _equal(mesh, strategy, sizes, scan=True, ulysses=None, dtype="float32", **arguments):
    """One case: sizes = (B, T, S, N, K, D); the rest are keywords of the call."""
    return mesh, strategy, sizes, scan, ulysses, dtype, arguments


CAUSAL, DROPOUT = {"is_causal": True}, {"dropout_rate": 0.3, "dropout_seed": jnp.uint32(5)}
EQUAL = {
    # every feature at once, lengths that nothing divides, chunks of several tiles
    "ring, causal, all features": _equal(
        "sp4 tp2", "ring", (2, 101, 101, 4, 2, 8), tile=(8, 8), **CAUSAL, **DROPOUT, **ids(2, 101),
        alibi_slopes=jnp.asarray(alibi_slopes(4)), sinks=normal(4), bias=normal(2, 4, 101, 101),
    ),
    "ring, window across borders": _equal(
        "sp8", "ring", (1, 203, 203, 2, 1, 8), tile=(8, 8), local_window_size=(30, 3),
        alibi_slopes=jnp.asarray([0.1, 0.3]),
    ),
    "ulysses, gathered kv heads": _equal("dp2 sp4", "ulysses", (2, 37, 53, 8, 2, 8), **CAUSAL, **DROPOUT),
    "ring+ulysses, blocks": _equal(
        "sp8", "ring+ulysses", (1, 50, 70, 4, 4, 8), ulysses=2, prev_block_num=2, next_block_num=0, block_size=4,
        mask=jnp.asarray(rng(4).random((1, 1, 50, 70)) < 0.7), sinks=normal(4),
    ),
    "gather, lengths": _equal(
        "dp2 sp4", "gather", (2, 37, 37, 2, 2, 8), **CAUSAL, query_seq_lengths=jnp.array([30, 37]),
        key_value_seq_lengths=jnp.array([20, 37]),
    ),
    "merge, sinks": _equal("sp4 tp2", "merge", (2, 3, 37, 4, 2, 8), **CAUSAL, **DROPOUT, sinks=normal(4)),
    "kv heads replicated, batch of one": _equal("tp4 sp2", None, (1, 21, 21, 8, 2, 8), **CAUSAL),
}  # fmt: skip
SLOW_EQUAL = {
    "ring, dense": _equal("sp8", "ring", (2, 64, 64, 2, 2, 8)),
    "ring, unrolled": _equal("sp8", "ring", (1, 100, 100, 2, 1, 8), scan=False, **CAUSAL),
    "ring, bf16": _equal("sp8", "ring", (1, 300, 300, 2, 1, 16), dtype="bfloat16", **CAUSAL),
    "ring, traced offsets": _equal("sp8", "ring", (2, 40, 90, 2, 1, 8), q_offset=jnp.array([3, 50]), **CAUSAL),
    "ring, more queries than keys": _equal("sp8", "ring", (1, 90, 40, 2, 1, 8), **CAUSAL),
    "ring, compact mask": _equal(
        "sp8", "ring", (1, 96, 96, 2, 1, 8), mask=jnp.asarray(rng(4).random((4, 4)) < 0.7), block_size=4
    ),
    "ring, one-sided window, tiles": _equal(
        "sp8", "ring", (1, 1000, 1000, 2, 1, 8), tile=(16, 16), local_window_size=(200, 0), **CAUSAL
    ),
    "ring, wide two-sided window": _equal("sp8", "ring", (1, 160, 160, 2, 1, 8), local_window_size=(50, 50)),
    "ring, row and head biases": _equal(
        "sp4 tp2", "ring", (2, 33, 33, 4, 2, 8), bias=normal(1, 4, 1, 33), logits_soft_cap=2.0, **CAUSAL
    ),
    "ring, slopes a batch": _equal("dp2 sp4", "ring", (2, 33, 33, 4, 2, 8), alibi_slopes=normal(2, 4) ** 2, **CAUSAL),
    "ring, three kv heads on two": _equal("sp4 tp2", "ring", (1, 33, 33, 6, 3, 8), **CAUSAL),
    "ulysses, bias a head": _equal("sp4 tp2", "ulysses", (1, 33, 33, 8, 8, 8), bias=normal(1, 8, 33, 33), **ids(1, 33)),
    "ulysses, slopes and sinks": _equal(
        "sp8", "ulysses", (1, 40, 40, 8, 4, 8), alibi_slopes=jnp.asarray(alibi_slopes(8)), sinks=normal(8), **CAUSAL
    ),
    "ring+ulysses, causal, everything": _equal(
        "sp8", "ring+ulysses", (1, 101, 101, 8, 2, 8), ulysses=4, **CAUSAL, **DROPOUT, **ids(1, 101),
        bias=normal(1, 8, 101, 101), alibi_slopes=jnp.asarray(alibi_slopes(8)),
    ),
    "merge, one token of a cache": _equal(
        "sp8", "merge", (2, 1, 90, 4, 2, 8), key_value_seq_lengths=jnp.array([33, 90]),
        q_offset=jnp.array([32, 89]), **CAUSAL,
    ),
    "ring, heads and batch replicated": _equal("dp2 tp2 sp2", "ring", (1, 33, 33, 3, 3, 8), sinks=normal(3), **CAUSAL),
    "ring, lengths beyond the keys": _equal(
        "sp8", "ring", (2, 37, 37, 2, 1, 8), key_value_seq_lengths=jnp.array([20, 1000])
    ),
    "gather, window": _equal("sp8", "gather", (1, 90, 90, 2, 1, 8), local_window_size=(20, 4)),
}  # fmt: skip


def equal(name):
    """[(what, error, largest value)] of output, LSE and all gradients against one device's plain formula."""
    mesh, strategy, sizes, scan, ulysses, dtype, arguments = dict(EQUAL, **SLOW_EQUAL)[name]
    batch, q_len, kv_len, heads, kv_heads, dim = sizes
    query, weights = (normal(batch, q_len, heads, dim, seed=seed).astype(dtype) for seed in (1, 2))
    key, value = (normal(batch, kv_len, kv_heads, dim, seed=seed).astype(dtype) for seed in (3, 4))
    d_lse = normal(batch, heads, q_len, seed=5)
    wanted = {name: x for name, x in arguments.items() if name in DIFFERENTIABLE}
    constant = {name: x for name, x in arguments.items() if name not in DIFFERENTIABLE}

    def results(attend):
        def loss(tensors, wanted):
            out, lse = attend(*tensors, return_lse=True, **wanted, **constant)
            seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return (out * weights).sum() + (seen * d_lse).sum(), {"out": out, "lse": lse}

        (_, found), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))((query, key, value), wanted)
        return dict(found, **dict(zip(("query", "key", "value"), grads[0])), **grads[1])

    spread = functools.partial(attention, mesh=make_mesh(DIMS[mesh]), strategy=strategy, scan=scan, ulysses=ulysses)
    found = results(spread)
    constant.pop("tile", None)
    want = results(functools.partial(flash_attention, implementation="reference"))
    return [(what, *difference(found[what], want[what])) for what in want]


def difference(found, want):
    """(largest absolute difference, largest value); inf where the infinities are not the same."""
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    if found.shape != want.shape or not np.array_equal(found[~finite], want[~finite]):
        return float("inf"), 0.0
    return float(np.abs(found[finite] - want[finite]).max()), float(np.abs(want[finite]).max())


# --- what the compiled program sends --------------------------------------------------------------
WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
OPERATION = re.compile(
    r"= (\(?[^=]*?\)?) (collective-permute|all-to-all|all-gather|reduce-scatter|all-reduce)(?:-start)?\((.*)$", re.M
)
GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")  # {{0,1},{2,3}} or [2,2]<=[4]


def sent(text):
    """{operation: bytes} that a device sends in an HLO program; collectives of one member send nothing."""
    share = {
        "collective-permute": lambda n: 1.0,
        "all-to-all": lambda n: (n - 1) / n,
        "all-gather": lambda n: (n - 1) / n,
        "reduce-scatter": lambda n: n - 1,
        "all-reduce": lambda n: 2 * (n - 1) / n,
    }
    total = {}
    for shapes, name, rest in OPERATION.findall(re.sub(r"/\*.*?\*/", "", text)):
        size = sum(
            WIDTHS[kind] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        members = 0
        if name != "collective-permute":
            listed, count = GROUPS.search(rest).groups()
            members = int(count) if count else len(listed.split(","))
        if members != 1:
            total[name] = total.get(name, 0) + size * share[name](members)
    return total


VOLUMES = {
    "ring, dense": ("ring", None, {}),
    "ring, causal": ("ring", None, CAUSAL),
    "ring, window": ("ring", None, {"local_window_size": (40, 10)}),
    "ring, window inside a neighbour": ("ring", None, {"local_window_size": (20, 0), **CAUSAL}),
    "ulysses": ("ulysses", None, CAUSAL),
    "ring+ulysses": ("ring+ulysses", 4, CAUSAL),
    "gather": ("gather", None, CAUSAL),
    "merge": ("merge", None, {}),
}


def volumes(name):
    """Bytes and permutes of the program, forward and with gradients, and what the formulas say."""
    strategy, ulysses, arguments = VOLUMES[name]
    q_len = 4 if strategy == "merge" else 256
    query = jax.ShapeDtypeStruct((1, q_len, 8, 8), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 256, 4, 8), jnp.float32)
    options = dict(arguments, mesh=make_mesh(DIMS["sp8"]), strategy=strategy, ulysses=ulysses)
    plan = explain(query, key, key, **options)

    def attend(*tensors):
        return attention(*tensors, scan=False, **options)

    def both(query, key, value, d_out):
        out, pullback = jax.vjp(attend, query, key, value)
        return out, pullback(d_out)

    forward = sent(jax.jit(attend).lower(query, key, key).compile().as_text())
    found = {"forward": forward, "forward formula": volume.forward(plan), "hops": plan.hops, "zigzag": plan.zigzag}
    if volume.backward(plan) is not None:
        found["both"] = sent(jax.jit(both).lower(query, key, key, query).compile().as_text())
        found["both formula"] = volume.forward(plan) + volume.backward(plan)
        found["keys kept"] = found["both formula"] - volume.travel(plan)
    return found


# --- the documented example -----------------------------------------------------------------------
def example(name):
    """Errors of every mechanism in the published calls, context 512, head size 64, mesh (1, -1, 1, 1)."""
    from flash_attention.jax import AttentionRegistry, FlexibleAttentionModule, PartitionAxis

    del name
    batch, context, heads, dim = 8, 512, 4, 64
    mesh = make_mesh((1, -1, 1, 1))
    tensors = [normal(batch, context, heads, dim, seed=seed) for seed in (1, 2, 3)]
    want = jax.jit(functools.partial(flash_attention, is_causal=True, implementation="reference"))(*tensors)
    errors = {}
    for mechanism in AttentionRegistry.list_implementations():
        if mechanism in ("cudnn", "splash") or not AttentionRegistry.get(mechanism).exact:
            continue
        window = {"local_window_size": (context, context)} if mechanism == "local" else {}
        attention_module = FlexibleAttentionModule(
            mesh=mesh,
            attn_mechanism=mechanism,
            sm_scale=dim**-0.5,
            num_attention_heads=heads,
            head_dims=dim,
            partition_axis=PartitionAxis(),
            **window,
        )
        with mesh:
            out = jax.jit(attention_module)(*tensors).attention_outputs
        errors[mechanism] = difference(out, want)[0]
    return errors


def module(name):
    """Errors of mechanisms over heads and sequence (mesh (1, 1, 2, 4)), with the ways in which they can be sharded."""
    from flash_attention.jax import FlexibleAttentionModule

    del name
    mesh, errors = make_mesh((1, 1, 2, 4)), {}
    query = normal(2, 40, 8, 16, seed=1)
    key, value = (normal(2, 40, 4, 16, seed=seed) for seed in (2, 3))
    ways = {
        "plain": {},
        "constraint": {"use_sharding_constraint": True},
        "XLA's": {"shard_attention_computation": False},
        "unrolled": {"scan_ring_attention": False},
    }
    runs = [("flash_attn2", way) for way in ways] + [("ring", "plain"), ("ring", "unrolled"), ("ulysses", "plain")]
    runs += [("blockwise", "plain"), ("sharded_vanilla", "constraint"), ("autoregressive", "plain")]
    for mechanism, way in runs:
        layer = FlexibleAttentionModule(
            mesh=mesh, attn_mechanism=mechanism, num_attention_heads=8, num_kv_heads=4, head_dims=16, **ways[way]
        )
        queries = query[:, :1] if mechanism == "autoregressive" else query
        filled = {"uses_cache": True, "key_value_sequence_length": jnp.array([17, 40])} if queries is not query else {}
        lengths = {"key_value_seq_lengths": jnp.array([17, 40]), "q_offset": jnp.array([16, 39])} if filled else {}
        want = flash_attention(queries, key, value, is_causal=True, implementation="reference", **lengths)
        out = jax.jit(functools.partial(layer, **filled))(queries, key, value).attention_outputs
        errors[mechanism + ", " + way] = difference(out, want)[0]
    return errors


def large(name):
    """Temporaries, in bytes, of the published example at its printed size with 'flash_attn2', a device."""
    from flash_attention.jax import FlexibleAttentionModule

    del name
    mesh = make_mesh((1, -1, 1, 1))
    module = FlexibleAttentionModule(mesh=mesh, attn_mechanism="flash_attn2", num_attention_heads=32, head_dims=256)
    x = jax.ShapeDtypeStruct((8, 8192, 32, 256), jnp.float32)
    program = jax.jit(lambda *qkv: module(*qkv).attention_outputs).lower(x, x, x).compile()
    return program.memory_analysis().temp_size_in_bytes


def memory(name):
    """{devices: temporaries and results, in bytes a device} of the gradients of a causal ring at one length."""
    del name
    found = {}
    for parts in (2, 8):
        mesh = make_mesh((1, 1, 1, parts), devices=jax.devices()[:parts])

        def loss(query, key, value, mesh=mesh):
            return attention(query, key, value, mesh=mesh, strategy="ring", is_causal=True).sum()

        x = jax.ShapeDtypeStruct((1, 65536, 1, 64), jnp.float32)
        analysis = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()
        found[parts] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return found


def million(name):
    """A million tokens, D = 64, one head, a window of 1,024 tokens, forward and backward: whether all is finite."""
    del name
    mesh = make_mesh((1, 1, 1, 8))
    tensors = [normal(1, 2**20, 1, 64, seed=seed) for seed in (1, 2, 3)]

    def loss(*tensors):
        return (attention(*tensors, mesh=mesh, strategy="ring", is_causal=True, local_window_size=(1024, 0)) ** 2).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*tensors)
    # The middle of a shard's border, judged by a call on the tokens around it.
    part = slice(2**19 - 2048, 2**19 + 2048)
    local = jax.grad(
        lambda *x: (flash_attention(*x, is_causal=True, local_window_size=(1024, 0))[:, 1024:] ** 2).sum(), (0, 1, 2)
    )(*(x[:, part] for x in tensors))
    inside = slice(1536, 2560)
    errors = [difference(grad[:, part][:, inside], want[:, inside])[0] for grad, want in zip(grads, local)]
    return {"finite": all(bool(jnp.isfinite(grad).all()) for grad in grads), "errors": errors}


# --- dilated attention ----------------------------------------------------------------------------
DILATED = {
    # 16 tokens a device: patterns inside a device, over two, four and all of them
    "causal, mixture, T5 bias": (128, {"segment_size": (8, 32, 64), "dilation_rate": (1, 2, 4)}, True, "bias"),
    "both ways, longer than the sequence": (128, {"segment_size": (16, 4096), "dilation_rate": (3, 4)}, False, None),
}
SLOW_DILATED = {
    "both ways, T5 bias, block offsets": (
        128, {"segment_size": (32, 128), "dilation_rate": (2, 8), "head_offset": "block"}, False, "bias"
    ),
    "causal, xPos": (128, {"segment_size": (8, 64), "dilation_rate": (1, 4)}, True, "xpos"),
    "both ways, xPos": (128, {"segment_size": (32,), "dilation_rate": (2,)}, False, "xpos"),
    "frozen weights": (
        128, {"segment_size": (8, 32), "dilation_rate": (1, 2), "stop_weight_grad": True}, True, None
    ),
}  # fmt: skip


def dilated(name):
    """[(what, error, largest value)] of output, LSE and gradients over 8 devices against one."""
    from flash_attention.jax import dilated_attention
    from flash_attention.jax.distributed.mesh import shard_map

    length, options, causal, extra = dict(DILATED, **SLOW_DILATED)[name]
    query, key, value, weights = (normal(2, length, 4, 8, seed=seed) for seed in (1, 2, 3, 4))
    table = normal(32, 4, seed=5) if extra == "bias" else None
    call = functools.partial(dilated_attention, is_causal=causal, use_xpos=extra == "xpos", return_lse=True, **options)

    def over_devices(query, key, value, rel_pos_table):
        tokens, whole = jax.sharding.PartitionSpec(None, "sp"), jax.sharding.PartitionSpec()
        lse = jax.sharding.PartitionSpec(None, None, "sp")
        attend = lambda q, k, v, table: call(q, k, v, rel_pos_table=table, axis_name="sp")  # noqa: E731
        spread = shard_map(attend, make_mesh(DIMS["sp8"]), (tokens,) * 3 + (whole,), (tokens, lse))
        return spread(query, key, value, rel_pos_table)

    def results(attend):
        def loss(query, key, value, table):
            out, lse = attend(query, key, value, rel_pos_table=table)
            return (out * weights).sum(), {"out": out, "lse": lse}

        argnums = (0, 1, 2) if table is None else (0, 1, 2, 3)
        (_, found), grads = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(query, key, value, table)
        return dict(found, **dict(zip(("query", "key", "value", "table"), grads)))

    found, want = results(over_devices), results(call)
    return [(what, *difference(found[what], want[what])) for what in want]


def dilated_layer(name):
    """[(what, error, largest value)] of the layer with Distributed=True, dropout on, and gradients."""
    from flash_attention.jax import DilatedAttention
    from flash_attention.jax.distributed.mesh import shard_map

    del name
    sizes = {"dim": 16, "heads": 4, "segment_size": (8, 32), "dilation_rate": (1, 2), "causal": True, "dropout": 0.3}
    alone = DilatedAttention(**sizes)
    layer = DilatedAttention(**sizes, Distributed=True, axis_name="sp")
    x, weights, rng = normal(2, 128, 16, seed=1), normal(2, 128, 16, seed=2), jax.random.PRNGKey(3)
    tokens, whole = jax.sharding.PartitionSpec(None, "sp"), jax.sharding.PartitionSpec()

    def one(params, x):
        return alone(x, params=params, deterministic=False, dropout_rng=rng)

    def many(params, x):
        attend = lambda params, x: layer(x, params=params, deterministic=False, dropout_rng=rng)  # noqa: E731
        return shard_map(attend, make_mesh(DIMS["sp8"]), (whole, tokens), tokens)(params, x)

    def results(attend):
        def loss(params, x):
            out = attend(params, x)
            return (out * weights).sum(), out

        (_, out), (d_params, d_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(alone.params, x)
        return [out, d_x] + jax.tree.leaves(d_params)

    pairs = zip(results(many), results(one))
    return [(str(number), *difference(*pair)) for number, pair in enumerate(pairs)]


def dilated_volume(name):
    """{length: bytes gathered by a device} at patterns that grow with the devices: the same at every length."""
    from flash_attention.jax import dilated_attention
    from flash_attention.jax.distributed.mesh import shard_map

    del name
    found = {}
    for shared in (2, 4, 8):  # devices that share a segment; the rate grows with it
        tokens = jax.sharding.PartitionSpec(None, "sp")
        attend = functools.partial(
            dilated_attention, segment_size=64 * shared, dilation_rate=4 * shared, is_causal=True, axis_name="sp"
        )
        spread = shard_map(attend, make_mesh(DIMS["sp8"]), (tokens,) * 3, tokens)
        x = jax.ShapeDtypeStruct((1, 512, 32, 8), jnp.float32)
        found[shared] = sent(jax.jit(spread).lower(x, x, x).compile().as_text())
    return found


KINDS = {
    "dilated": dilated,
    "dilated_layer": dilated_layer,
    "dilated_volume": dilated_volume,
    "module": module,
    "equal": equal,
    "volumes": volumes,
    "example": example,
    "large": large,
    "memory": memory,
    "million": million,
}


def main(words):
    if "quickly" in words:  # small programs, each run once
        jax.config.update("jax_disable_most_optimizations", True)
    for word in words:
        kind, _, name = word.partition(":")
        if kind in KINDS:
            print(json.dumps({word: KINDS[kind](name)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
