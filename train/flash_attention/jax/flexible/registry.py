"""AttentionImpl, what a mechanism is, and AttentionRegistry, where it is found by name.

A mechanism is one decorated class with one method; factory, benchmark and tests find it by the decorator:

    @AttentionRegistry.register
    class Mine(AttentionImpl):
        names = "mine"

        def forward_native(self, query, key, value, *, is_causal=False, scale=None):
            return AttentionOutput(attention_outputs=...)

It is given exactly the arguments that a caller set, under the keywords of ``flash_attention.jax.flash_attention``. One
that its method does not take is refused with a reason: a mechanism cannot ignore anything.
"""

import functools
import inspect

import jax
import jax.numpy as jnp

from flash_attention.core.errors import invalid_value
from flash_attention.core.ranges import Band, visible
from flash_attention.core.registry import ARGUMENTS, Registry, is_default, not_taken
from flash_attention.core.validation import check_bool
from flash_attention.jax.engines.platforms import backend
from flash_attention.jax.flexible.output import AttentionOutput
from flash_attention.jax.flexible.partition import check_mode, create_stable_sharding

# backend -> forward methods, the most specific one first
_CHAINS = {
    "cpu": ("forward_cpu", "forward_native"),
    "gpu": ("forward_gpu", "forward_native"),
    "cuda": ("forward_cuda", "forward_gpu", "forward_native"),
    "rocm": ("forward_rocm", "forward_gpu", "forward_native"),
    "tpu": ("forward_tpu", "forward_native"),
    "tt": ("forward_tt", "forward_native"),
}


class AttentionImpl:
    """Base class of mechanisms: BTHD tensors in, :class:`AttentionOutput` out.

    A subclass sets ``names`` (a name, or a tuple of the name and its aliases) and defines ``forward_native``; where a
    platform needs other code, also ``forward_cpu``, ``forward_gpu`` (of both) ``forward_cuda``, ``forward_rocm``,
    ``forward_tpu`` or ``forward_tt``. They take (query, key, value) and keywords of
    ``core.registry.ARGUMENTS``.

    Args:
        metadata: :class:`AttentionMetadata`.

    Attributes:
        names: the name and aliases.
        exact: True when the mechanism is softmax attention over all visible keys, so that the formula judges it.
        takes: fields of the metadata that it alone honours, of ``segment_size`` and ``dilation_rate``.
    """

    names = ()
    exact = True
    takes = ()

    def __init__(self, metadata):
        self.metadata = metadata

    def forward_native(self, query, key, value, **arguments):
        """The mechanism where no platform has code of its own. (B, T, N, D) and (B, S, K, D) in."""
        raise NotImplementedError("{} defines no forward_native".format(type(self).__name__))

    def supports(self, query, key, value, arguments):
        """None, or the Reason why this call, whose argument names all fit, cannot run. It never raises."""
        del query, key, value, arguments

    @classmethod
    def get_impl_name(cls):
        """The name, without aliases."""
        return cls.names if isinstance(cls.names, str) else cls.names[0]

    def get_impl_metadata(self):
        """The :class:`AttentionMetadata` it was created with."""
        return self.metadata

    def get_mode(self, q, BTHD=True):
        """See :meth:`AttentionMetadata.get_mode`."""
        return self.metadata.get_mode(q, BTHD)

    def current_backend(self):
        """'cpu', 'cuda', 'rocm', 'tpu' or what ``metadata.backend`` forces."""
        if self.metadata.backend is not None:
            return self.metadata.backend
        return backend()

    def forward_method(self):
        """The most specific ``forward_*`` that the class defines for the current backend."""
        for name in _CHAINS.get(self.current_backend(), ("forward_native",)):
            if hasattr(self, name):
                return getattr(self, name)
        raise AssertionError("the base class defines forward_native")

    def refuses(self, query, key, value, arguments):
        """The Reason why this call cannot run here, or None; ``arguments``: the keywords of ARGUMENTS that are set."""
        for name in ("segment_size", "dilation_rate"):
            setting = getattr(self.metadata, name)
            if setting is not None and name not in self.takes:
                return not_taken(name, setting)
        takes = inspect.signature(self.forward_method()).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            for name in arguments:
                if name not in takes:
                    return not_taken(name, arguments[name])
        return self.supports(query, key, value, arguments)

    def __call__(self, query, key, value, *, mode=None, deterministic=True, dropout_rng=None, **arguments):
        """Attend.

        Args:
            query: (B, T, N, D); key, value: (B, S, K, D); K divides N.
            mode: '__train__', '__prefill__', '__autoregressive__', '__insert__'; default :meth:`get_mode`. It says how
                tensors lie on a mesh, for mechanisms whose method takes ``mode``; the result is the same.
            deterministic: False = training: ``metadata.dropout_prob`` acts.
            dropout_rng: PRNG key that the dropout's seed is drawn from.
            arguments: keywords of :data:`ARGUMENTS`, which are those of ``flash_attention.jax.flash_attention``.

        Returns:
            :class:`AttentionOutput`, of ``metadata.runtime_dtype``.

        Raises:
            UnsupportedError: the mechanism cannot honour an argument, or not here; the message says why and what can.
        """
        layer = self.get_impl_name()
        for name in arguments:
            if name not in ARGUMENTS:
                raise TypeError("'{}' is no argument of a mechanism. They are: {}".format(name, ", ".join(ARGUMENTS)))
        mode = check_mode(self.get_mode(query) if mode is None else mode)
        arguments = {name: x for name, x in arguments.items() if not is_default(name, x)}
        arguments.update(self._dropout(layer, deterministic, dropout_rng, arguments))
        if self.metadata.softmax_scale is not None and "scale" not in arguments:
            arguments["scale"] = self.metadata.softmax_scale
        if arguments.get("scale") == query.shape[-1] ** -0.5:
            del arguments["scale"]
        reason = self.refuses(query, key, value, arguments)
        if reason is not None:
            raise reason.error(layer)
        if self.metadata.runtime_dtype is not None:
            query, key, value = (x.astype(self.metadata.runtime_dtype) for x in (query, key, value))
        forward = self.forward_method()
        if "mode" in inspect.signature(forward).parameters:
            arguments["mode"] = mode
        return forward(query, key, value, **arguments)

    def _dropout(self, layer, deterministic, rng, arguments):
        check_bool(layer, "deterministic", deterministic)
        rate = self.metadata.dropout_prob
        if deterministic or not rate or "dropout_rate" in arguments:
            return {}
        if rng is None:
            remedy = "Pass a PRNG key, or deterministic=True."
            raise invalid_value(layer, "dropout_rng", "given when deterministic=False and dropout acts", None, remedy)
        return {"dropout_rate": rate, "dropout_seed": jax.random.bits(rng, (), "uint32")}

    @staticmethod
    def repeat_kv_heads(key, value, num_reps):
        """(B, S, K, D) -> (B, S, K * num_reps, D), each head repeated in place: 0, 0, 1, 1."""
        return jnp.repeat(key, num_reps, axis=2), jnp.repeat(value, num_reps, axis=2)

    @staticmethod
    def combine_masks(*masks):
        """AND of keep masks (True or > 0), broadcast against each other; None counts as all True."""
        kept = [jnp.asarray(mask) > 0 for mask in masks if mask is not None]
        return functools.reduce(jnp.logical_and, kept) if kept else None

    @staticmethod
    def causal_mask(q_len, kv_len, q_offset=None):
        """Keep mask (1, 1, q_len, kv_len) of causality, bottom-right unless ``q_offset`` says otherwise."""
        band = Band(q_len, kv_len, right=0)
        position = jnp.arange(q_len)[:, None] + (kv_len - q_len if q_offset is None else q_offset)
        return visible(band, position, jnp.arange(kv_len)[None, :])[None, None]

    @staticmethod
    def mask_to_bias(mask, dtype=jnp.float32):
        """0 where a keep mask keeps, -inf elsewhere, for a mechanism that takes a bias only."""
        return jnp.where(jnp.asarray(mask) > 0, 0.0, -jnp.inf).astype(dtype)

    def create_stable_sharding(self, state_ps, preserved_indices=None, clone_ps=None, dep=True, tensor=None):
        """See :func:`create_stable_sharding`; the mesh is the metadata's."""
        return create_stable_sharding(state_ps, preserved_indices, clone_ps, dep, tensor, self.metadata.mesh)


class AttentionRegistry(Registry):
    """Mechanisms by name. A name may have aliases, which :meth:`aliases` lists."""

    _classes = {}
    _aliases = {}
    absent = {
        "pallas_flash": "'flash_attn2' is the same attention.",
        "cudnn_flash_attn": "It is called 'cudnn' here.",
    }

    @classmethod
    def register_function(cls, names, function, exact=False):
        """Register ``function(query, key, value, ...)``, BTHD in and out, as a mechanism.

        Args:
            names: a name, or a tuple of the name and its aliases.
            function: its keywords among :data:`ARGUMENTS` are what the mechanism takes; all others are refused.
            exact: see :class:`AttentionImpl`.
        """

        return cls.register(impl_of(names, function, exact))

    @classmethod
    def create(cls, name, metadata):
        """An instance of the mechanism."""
        return cls.get(name)(metadata)


def impl_of(names, function, exact=False):
    """The :class:`AttentionImpl` subclass, not registered, of a function: see ``register_function``."""

    @functools.wraps(function)  # the signature says what it takes
    def forward(query, key, value, **arguments):
        return output_of(function(query, key, value, **arguments))

    body = {"names": names, "exact": exact, "forward_native": staticmethod(forward), "__doc__": function.__doc__}
    return type(getattr(function, "__name__", "Mechanism"), (AttentionImpl,), body)


def output_of(array):
    """:class:`AttentionOutput` of a mechanism that forms no weights."""
    return AttentionOutput(attention_outputs=array)
