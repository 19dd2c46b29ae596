"""JAX candidates: our implementations by name, jax.nn.dot_product_attention and the plain formula. Layout BSND."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention.jax import ENGINES, flash_attention
from flash_attention.tools.bench.cases import LAYERS, SEED
from flash_attention.tools.bench.mechanisms_in_jax import MECHANISMS
from flash_attention.tools.bench.peers_in_jax import PEERS, alibi_bias, segment_mask

CANDIDATES = ("auto", "jax.nn", "jax.nn cudnn", "naive")


def build(case, direction, candidate, arrays, ahead=False):
    """``(call, results)``: ``call()`` runs once to completion, ``results()`` gives numpy (out, d_query or None).

    Args:
        candidate: 'auto' or an engine of ``flash_attention.jax.ENGINES``, 'jax.nn', 'jax.nn cudnn' (asked for its cuDNN
            kernel), 'naive', a library of ``PEERS``, or a mechanism. For layers, whose weights the judge does not know,
            ``results()`` gives None.
        ahead: compile here, not at the first call.
    """
    inputs = [jnp.asarray(_bsnd(arrays[name])).astype(case.dtype) for name in ("query", "key", "value", "d_out")]
    run = jax.jit(_function(case, direction, candidate))
    if ahead:
        run = run.lower(*inputs).compile()
    last = {}

    def call():
        last.clear()  # the results of the call before would count as memory of this one
        last["results"] = jax.block_until_ready(run(*inputs))

    def results():
        if candidate in LAYERS:
            return None, None
        out, grads = last["results"]
        return _bnsd(out), None if grads is None else _bnsd(grads[0])

    return call, results


def compile_seconds(case, direction, candidate):
    """Seconds to trace, lower and compile, see :func:`compile_only`."""
    begin = time.perf_counter()
    compile_only(case, direction, candidate)
    return time.perf_counter() - begin


def compile_only(case, direction, candidate):
    """Compile the call; no array of the case's size exists, so any length can be asked."""
    spec = case.spec()
    q = jax.ShapeDtypeStruct((spec.batch, spec.q_len, spec.heads, spec.head_dim), case.dtype)
    kv = jax.ShapeDtypeStruct((spec.batch, spec.kv_len, spec.kv_heads, spec.head_dim), case.dtype)
    jax.jit(_function(case, direction, candidate)).lower(q, kv, kv, q).compile()


def _bsnd(x):
    return np.ascontiguousarray(np.swapaxes(x, 1, 2))


def _bnsd(x):
    return np.swapaxes(np.asarray(x.astype(jnp.float32)), 1, 2)


def _function(case, direction, candidate):
    attend = _attention(case, candidate)

    def forward(query, key, value, d_out):
        del d_out
        return attend(query, key, value), None

    def both(query, key, value, d_out):
        out, pullback = jax.vjp(attend, query, key, value)
        return out, pullback(d_out)

    return both if direction == "fwd+bwd" else forward


def _attention(case, candidate):
    if candidate in MECHANISMS:
        return MECHANISMS[candidate](case)
    if candidate in PEERS:
        return PEERS[candidate](case)
    if candidate.startswith("jax.nn"):
        return _jax_nn(case, candidate[len("jax.nn ") :] or None)
    if candidate == "naive":
        return functools.partial(_naive, case)
    options = dict(case.options(), **{name: jnp.asarray(x) for name, x in case.operands().items()})
    if case.dropout:
        options["dropout_seed"] = SEED
    ENGINES.check_name(None if candidate == "auto" else candidate)
    return functools.partial(flash_attention, implementation=None if candidate == "auto" else candidate, **options)


def _jax_nn(case, implementation=None):
    """jax.nn's function with what it can express; other windows and segments only through a mask."""
    spec = case.spec()
    if case.soft_cap or case.dropout or case.compact:
        raise ValueError("jax.nn.dot_product_attention has no such option")
    options, masks = {"implementation": implementation}, []
    if case.causal and spec.offset == 0:
        options["is_causal"] = True
    elif case.causal:
        masks.append(functools.partial(_band_mask, case))
    two_sided = case.window and case.window[1] and not case.causal
    if case.window and _window_works() and not (implementation == "cudnn" and two_sided):
        options["local_window_size"] = case.window
    elif case.window or case.blocks:
        masks.append(functools.partial(_band_mask, case))
    if case.segments:
        masks.append(functools.partial(segment_mask, case))

    def attend(query, key, value):
        built = dict(options)
        if masks:
            built["mask"] = functools.reduce(jnp.logical_and, [mask() for mask in masks])
        if case.alibi:
            built["bias"] = alibi_bias(case).astype(query.dtype)
        return jax.nn.dot_product_attention(query, key, value, **built)

    return attend


@functools.lru_cache(maxsize=None)
def _window_works():
    """False on jax 0.6, which ignores local_window_size when it is the only restriction."""
    x = jnp.eye(4)[None, :, None, :]
    out = jax.nn.dot_product_attention(x, x, x, local_window_size=(0, 0))
    return bool(jnp.allclose(out, x))


def _band_mask(case):
    """(1, 1, Sq, Sk), formed inside the jitted program, as a careful user would."""
    from flash_attention.core.ranges import visible

    spec = case.spec()
    seen = visible(spec.band, jnp.arange(spec.q_len)[:, None] + spec.offset, jnp.arange(spec.kv_len)[None, :])
    return seen[None, None]


def _naive(case, query, key, value):
    """The four lines of a tutorial, softmax in float32."""
    spec = case.spec()
    if not case.plain():
        raise ValueError("the naive formula here has no such option")
    key, value = (jnp.repeat(x, spec.group, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * spec.scale
    if case.causal or case.window or case.blocks:
        scores = jnp.where(_band_mask(case), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(value.dtype), value)


def limits(seconds):
    """What XLA reaches here: matmul GFLOP/s by dtype, fused exp in Gelem/s, memory read in GB/s."""
    found = {}
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    side, times = (1024, 1) if jax.default_backend() == "cpu" else (8192, 16)  # a GPU needs more to be busy
    for name in ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (side, side)).astype(name)  # zeros and ones multiply faster
        once = functools.partial(lambda a: product(a).block_until_ready(), a)
        found["matmul_{}_gflops".format(name)] = 2 * side**3 / seconds(once) / 1e9
    x = jnp.linspace(0.0, 1.0, times * 2**19).reshape(-1, 1024)
    softmax_sum = jax.jit(lambda x: jnp.sum(jnp.exp(x - jnp.max(x, -1, keepdims=True)), -1))
    memory = jnp.ones((times * 4096, 2**14))  # 256 MB, 4 GB: beyond every cache
    row_sums = jax.jit(lambda x: jnp.sum(x, -1))
    found["read_gbytes"] = memory.nbytes / seconds(lambda: row_sums(memory).block_until_ready()) / 1e9
    found["exp_gelem"] = x.size / seconds(lambda: softmax_sum(x).block_until_ready()) / 1e9
    return found
