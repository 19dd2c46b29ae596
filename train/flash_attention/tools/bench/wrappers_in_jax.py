"""The `wrappers` benchmark's model in JAX: one jitted training step with Adam, whose state is donated."""

import functools

import jax
import jax.numpy as jnp

from flash_attention.jax import AutoregressiveWrapper, Decoder, TransformerWrapper
from flash_attention.tools.bench import wrappers
from flash_attention.tools.bench.cases import SEED
from flash_attention.tools.bench.wrappers import VOCABULARY, check_direction, stack_options, tokens_of


def build(case, direction, candidate, arrays, ahead=False):
    """``(call, results)``: ``call()`` trains one step and gives the loss before it.

    Args:
        case: sizes of the attention. direction: 'fwd+bwd'. candidate: see ``wrappers.stack_options``.
        arrays: not used, a model makes its own queries.
        ahead: compile here, not at the first call.
    """
    del arrays
    check_direction(direction)
    net, tokens = model(case, candidate), jnp.asarray(tokens_of(case))
    params = net.init(jax.random.PRNGKey(SEED))
    held = {"state": (params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), 0.0)}
    step = jax.jit(functools.partial(_step, net), donate_argnums=0)
    if ahead:
        step = step.lower(held["state"], tokens).compile()

    def call():
        held["state"], loss = jax.block_until_ready(step(held.pop("state"), tokens))
        return float(loss)

    return call, lambda: (None, None)  # the tests judge the losses


def compile_only(case, direction, candidate):
    """Compile the step."""
    build(case, direction, candidate, None, ahead=True)


def model(case, candidate):
    """The decoder with the candidate's attention."""
    stack = Decoder(dtype=case.dtype, **stack_options(case, candidate, naive))
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=case.q_len, attn_layers=stack)
    return AutoregressiveWrapper(net)


def naive(query, key, value, *, is_causal=False):
    """softmax(q k^T / sqrt(D) + mask) v of BTHD tensors, softmax in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if is_causal:
        scores = jnp.where(jnp.tri(query.shape[1], key.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(value.dtype), value)


def _step(net, state, tokens):
    """Adam (Kingma and Ba, 2015) with the usual constants: ``((params, first, second, count), loss)``."""
    params, first, second, count = state
    loss, grads = jax.value_and_grad(lambda params: net(tokens, params=params))(params)
    count = count + 1.0
    rate = wrappers.RATE * jnp.sqrt(1.0 - 0.999**count) / (1.0 - 0.9**count)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
    params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second)
    return (params, first, second, count), loss
