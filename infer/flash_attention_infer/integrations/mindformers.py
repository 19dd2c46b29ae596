"""``mindformers``: generation with our caches for its LLaMA (1.9.0) and BLOOM (1.3.2, the last version that has it).

    from flash_attention_infer.integrations.mindformers import CachedModel
    with CachedModel(model, cache) as forward:
        tokens = generate(forward, cache, prompts, max_new_tokens=32)

LLaMA's cached decoding (``use_past=True``) runs vendor operators, which only Atlas A2 and A3 have; BLOOM's computes on
the whole length at every token. Here the model is one for training, with ``use_past=False`` and
``use_flash_attention=True``. While a step runs, each layer's flash attention leads to the cache; positions (LLaMA's
rotary angles, BLOOM's ALiBi) follow from the step.
"""

import importlib

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from flash_attention.core.errors import Reason, invalid_value
from flash_attention.integrations.patching import check_version
from flash_attention_infer.integrations import cached

LAYER = "flash_attention_infer.integrations.mindformers"


class CachedModel(cached.CachedModel):
    """The ``forward`` of ``generate``, ``stream`` and ``Scheduler`` for a model of the library, in PyNative mode.

    Inside its ``with`` block the model may be run by this object alone; afterwards it has its own attention again.

    Args:
        model (Cell): ``LlamaForCausalLM`` or ``BloomLMHeadModel`` with ``use_flash_attention=True`` and
            ``use_past=False``.
        cache (KVCache): of ``flash_attention_infer.nn``, with the model's layers, key/value heads and head size.
        engine (str): None = the best one here.
        any_version (bool): also take a version of the library that was not tested with the model.

    Raises:
        UnsupportedError: the library's version was not tested, or the model asks for what is not served.
        ValueError: the cache has another number of layers than the model; a position beyond LLaMA's longest.
    """

    def __init__(self, model, cache, engine=None, any_version=False):
        adapter = _adapter_of(model)
        check_version(LAYER, importlib.import_module("mindformers"), adapter.tested, any_version)
        for name, needed in adapter.needs.items():
            got = bool(getattr(model.config, name, False))
            if got is not needed:
                remedy = "Build the model with {}={}.".format(name, needed)
                raise Reason(name, str(got), str(needed), remedy).error(LAYER)
        super().__init__(LAYER, model, cache, engine, model.config.num_layers)
        self._adapter = adapter(model)

    def patch(self, patches):
        """The ``construct`` of each layer's flash attention, and of what depends on positions."""
        self._adapter.patch(patches, self.attend)

    def logits(self, tokens, positions, last):
        """The model's layers and head, without its labels."""
        return self._adapter.logits(tokens, positions, last)


class _Llama:
    """``LlamaForCausalLM``: its rotary angles become those of the tokens' positions."""

    tested = ("1.9.0",)
    needs = {"use_flash_attention": True, "use_past": False, "use_ring_attention": False}

    def __init__(self, model):
        self.model, self.angles = model, None

    def patch(self, patches, attend):
        llama = self.model.model
        for layer in llama.layers:
            patches.set(
                layer.attention.flash_attention, "construct",
                lambda query, key, value, mask=None: attend(query, key, value).swapaxes(1, 2),
            )  # fmt: skip
        patches.set(llama.freqs_mgr, "construct", lambda *_, **__: self.angles)
        patches.set(llama.casual_mask, "construct", lambda *_, **__: None)

    def logits(self, tokens, positions, last):
        table = self.model.model.freqs_mgr
        if positions.max() >= table.freqs_cos.shape[0]:
            need = "below the model's max_position_embedding, {}".format(table.freqs_cos.shape[0])
            raise invalid_value(LAYER, "positions", need, positions.max())
        shape = (positions.shape[0], 1, positions.shape[1], -1)
        places = Tensor(positions.reshape(-1))
        self.angles = table.freqs_cos[places].reshape(shape), table.freqs_sin[places].reshape(shape), table.swap_mask
        hidden = _last_of(self.model.model(Tensor(tokens)), last)
        return self.model.lm_head(hidden).astype(mstype.float32)


class _Bloom:
    """``BloomLMHeadModel``: its layers, built for one length, take a step's; ALiBi comes from the slopes."""

    tested, needs = ("1.3.2",), {"use_flash_attention": True, "use_past": False}

    def __init__(self, model):
        self.model = model
        self.attentions = [layer.attention for layer in model.transformer.blocks]

    def patch(self, patches, attend):
        bloom = self.model.transformer
        slopes = bloom.build_alibi_tensor.slopes.reshape((-1,))
        for attention in self.attentions:
            for name in ("src_seq_length", "tgt_seq_length"):
                patches.set(attention, name, getattr(attention, name))  # put back at the end; set in each step
            patches.set(
                attention.flash_attention, "construct",
                lambda query, key, value, mask, alibi: attend(query, key, value, alibi_slopes=slopes).swapaxes(1, 2),
            )  # fmt: skip
        one = ops.ones((1, 1, 1), mstype.float32)  # read by nobody, of the fewest elements that the layers accept
        patches.set(bloom.make_causal_attention, "construct", lambda *_: one)
        patches.set(bloom.build_alibi_tensor, "construct", lambda *_: one.reshape((1, 1, 1, 1)))

    def logits(self, tokens, positions, last):
        for attention in self.attentions:
            attention.src_seq_length = attention.tgt_seq_length = tokens.shape[1]
        hidden, table = self.model.transformer(Tensor(tokens), None)
        return self.model.head(_last_of(hidden, last), table).astype(mstype.float32)


def _last_of(hidden, last):
    """Rows ``last`` of (B * T, H), from hidden states (B, T, H)."""
    return ops.gather(hidden.reshape((-1, hidden.shape[-1])), last, 0)


_ADAPTERS = {"LlamaForCausalLM": _Llama, "BloomLMHeadModel": _Bloom}


def _adapter_of(model):
    """The class through which :class:`CachedModel` serves ``model``."""
    for base in type(model).__mro__:
        if base.__name__ in _ADAPTERS and base.__module__.startswith("mindformers."):
            return _ADAPTERS[base.__name__]
    remedy = "Other models of the library are not served."
    raise Reason("model", "a " + type(model).__name__, "one of " + ", ".join(_ADAPTERS), remedy).error(LAYER)
