"""Bad arguments of the JAX function and class: the exact type and the whole message (support/bad_calls.py)."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.bad_calls import CELL, CONSTRUCTOR, FUNCTION, PLAIN, cell_tensors, function_tensors, refused

from flash_attention.core.errors import UnsupportedError
from flash_attention.jax import FlashAttention, flash_attention

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]


def expect_error(error, message, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == message


def arrays(tensors):
    return {name: jnp.ones(shape, dtype) for name, (shape, dtype) in tensors.items()}


@pytest.mark.parametrize("bad", CONSTRUCTOR, ids=lambda bad: bad.name)
def test_constructor(bad):
    expect_error(bad.error, bad.message, FlashAttention, **dict({"head_dim": 64}, **bad.options))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("bad", CELL, ids=lambda bad: bad.name)
def test_class(bad, jit):
    layer = FlashAttention(16, **bad.options)
    expect_error(bad.error, bad.message, jax.jit(layer) if jit else layer, **arrays(cell_tensors(bad)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("bad", FUNCTION, ids=lambda bad: bad.name)
def test_function(bad, jit):
    def call(**tensors):
        return flash_attention(**tensors, **bad.options)

    expect_error(bad.error, bad.message, jax.jit(call) if jit else call, **arrays(function_tensors(bad)))


def test_unknown_implementation():
    x = jnp.ones((1, 8, 1, 4))
    need = "one of 'auto', 'cudnn', 'pallas', 'xla', 'mosaic', 'splash', 'reference'"
    message = "For 'flash_attention', 'implementation' must be {}, but got 'triton'.".format(need)
    expect_error(ValueError, message, flash_attention, x, x, x, implementation="triton")
    message = "For 'FlashAttention', 'engine' must be {}, but got 'triton'.".format(need)
    expect_error(ValueError, message, FlashAttention, 64, engine="triton")


@pytest.mark.parametrize("name", ["dp", "mp"])
def test_class_is_not_split_by_hand(name):
    message = "For 'FlashAttention', '{}' must be 1 in JAX, but got 2. ".format(name)
    message += "Shard the inputs with jax.sharding; the call follows them."
    expect_error(UnsupportedError, message, FlashAttention, 64, **{name: 2})


def test_float64():
    x = np.ones((1, 8, 1, 4))
    message = (
        "For 'flash_attention', 'query' must be of dtype float16, bfloat16 or float32 unless jax_enable_x64 is set, "
        "but got float64. Cast it, or call jax.config.update('jax_enable_x64', True)."
    )
    expect_error(TypeError, message, flash_attention, x, x, x)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        error, message = refused(
            "xla", "dtype", "float16, bfloat16 or float32", "float64", "Use implementation='reference' for float64.",
            layer="flash_attention",
        )  # fmt: skip
        expect_error(error, message, flash_attention, x, x, x, implementation="xla")
        assert flash_attention(x, x, x, implementation="reference").dtype == np.float64


def test_negative_float_mask_is_a_bias():
    x = jnp.ones((1, 8, 1, 4))
    message = (
        "For 'flash_attention', 'mask' must be boolean or >= 0 (keep where True or > 0), but got a float mask with "
        "negative values. Pass an additive mask as bias=."
    )
    expect_error(ValueError, message, flash_attention, x, x, x, mask=jnp.full((8, 8), -1e9))


def test_both_ways_to_ask_for_the_lse():
    x = jnp.ones((1, 8, 1, 4))
    message = "For 'flash_attention', 'return_residual' must be False when return_lse=True, but got True. "
    message += "Both return the LSE."
    expect_error(ValueError, message, flash_attention, x, x, x, return_lse=True, return_residual=True)


def test_key_and_seed():
    layer = FlashAttention(4, 0.1)
    x = jnp.ones((1, 1, 8, 4))
    message = "For 'FlashAttention', 'dropout_rng' must be None when dropout_seed is given, but got a key."
    expect_error(
        ValueError, message, layer, x, x, x, deterministic=False, dropout_seed=1, dropout_rng=jax.random.key(0)
    )
    message = "For 'FlashAttention', 'dropout_seed' must be given when dropout_rate > 0, but got None."
    expect_error(ValueError, message, layer, x, x, x, deterministic=False)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_flags_are_bools(jit):
    x = jnp.ones((1, 1, 8, 4))

    def functional(x):
        return flash_attention(x, x, x, return_residual=1)

    def twin(x):
        return FlashAttention(4)(x, x, x, deterministic=1)

    message = "For 'flash_attention', 'return_residual' must be a bool, but got 1 (int)."
    expect_error(TypeError, message, jax.jit(functional) if jit else functional, x)
    message = "For 'FlashAttention', 'deterministic' must be a bool, but got 1 (int)."
    expect_error(TypeError, message, jax.jit(twin) if jit else twin, x)


@pytest.mark.parametrize("name, value, error, text", PLAIN)
def test_plain_arguments_that_may_be_arrays(name, value, error, text):
    x = jnp.ones((1, 8, 1, 4))
    message = "For 'flash_attention', '{}' must be {}".format(name, text)
    expect_error(error, message, flash_attention, x, x, x, **{name: value})


def test_seed_of_the_class():
    layer, x = FlashAttention(4, 0.1), jnp.ones((1, 1, 8, 4))
    message = "For 'FlashAttention', 'dropout_seed' must be in [0, 2**32), but got -1."
    expect_error(ValueError, message, layer, x, x, x, deterministic=False, dropout_seed=-1)


DEVICES = """
import jax, jax.numpy as jnp
from flash_attention.jax import flash_attention
a, b = jax.devices()
x = jnp.ones((1, 8, 1, 4))
print(a, b, sep="|")
try:
    flash_attention(jax.device_put(x, a), jax.device_put(x, a), jax.device_put(x, b))
except ValueError as error:
    print(error)
"""


def test_tensors_on_different_devices():
    path = os.pathsep.join(sys.path)
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", PYTHONPATH=path, JAX_PLATFORMS="cpu")
    printed = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    names, message = printed.stdout.strip().splitlines()  # versions of JAX name the devices differently
    assert message == (
        "For 'flash_attention', 'value' must be on the same devices as query, ['{}'], but got ['{}']. "
        "Move it with jax.device_put."
    ).format(*names.split("|"))
