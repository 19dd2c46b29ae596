"""``mindformers``: generation with our caches for its LLaMA.

    from flash_attention_infer.integrations.mindformers import CachedModel
    with CachedModel(model, cache) as forward:
        tokens = generate(forward, cache, prompts, max_new_tokens=32)

The library's own cached decoding (``use_past=True``) runs vendor operators, which only Atlas A2 and A3 have. Here the
model is one for training, with ``use_past=False`` and ``use_flash_attention=True``. While a step runs, each layer's
flash attention leads to the cache, and the rotary angles are those of the tokens' positions.
"""

import importlib

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from flash_attention.core.errors import Reason, invalid_value
from flash_attention.integrations.patching import check_version
from flash_attention_infer.integrations import cached

LAYER = "flash_attention_infer.integrations.mindformers"
TESTED = ("1.9.0",)


class CachedModel(cached.CachedModel):
    """The ``forward`` of ``generate``, ``stream`` and ``Scheduler`` for a LLaMA of the library, in PyNative mode.

    Inside its ``with`` block the model may be run by this object alone; afterwards it has its own attention again.

    Args:
        model (Cell): ``LlamaForCausalLM`` with ``use_flash_attention=True`` and ``use_past=False``.
        cache (KVCache): of ``flash_attention_infer.nn``, with the model's layers, key/value heads and head size.
        engine (str): None = the best one here.
        any_version (bool): also take a version of the library that was not tested.

    Raises:
        UnsupportedError: the library's version was not tested, or the model asks for what is not served.
        ValueError: the cache has another number of layers than the model; a position beyond the model's longest.
    """

    def __init__(self, model, cache, engine=None, any_version=False):
        check_version(LAYER, importlib.import_module("mindformers"), TESTED, any_version)
        _check(model)
        super().__init__(LAYER, model, cache, engine, model.config.num_layers)
        self._angles = None

    def patch(self, patches):
        """The ``construct`` of each layer's flash attention, of the model's angles and of its mask."""
        llama = self.model.model
        for layer in llama.layers:
            patches.set(layer.attention.flash_attention, "construct", self._attention)
        patches.set(llama.freqs_mgr, "construct", lambda *_, **__: self._angles)
        patches.set(llama.casual_mask, "construct", lambda *_, **__: None)

    def logits(self, tokens, positions, last):
        """The model's layers and head, without its labels."""
        table = self.model.model.freqs_mgr
        if positions.max() >= table.freqs_cos.shape[0]:
            need = "below the model's max_position_embedding, {}".format(table.freqs_cos.shape[0])
            raise invalid_value(LAYER, "positions", need, positions.max())
        shape = (positions.shape[0], 1, positions.shape[1], -1)
        places = Tensor(positions.reshape(-1))
        self._angles = table.freqs_cos[places].reshape(shape), table.freqs_sin[places].reshape(shape), table.swap_mask
        hidden = self.model.model(Tensor(tokens))
        hidden = ops.gather(hidden.reshape((-1, hidden.shape[-1])), last, 0)
        return self.model.lm_head(hidden).astype(mstype.float32)

    def _attention(self, query, key, value, attn_mask=None):
        return self.attend(query, key, value).swapaxes(1, 2)


def _check(model):
    """Raise unless the model is one that :class:`CachedModel` serves."""
    library = importlib.import_module("mindformers.models.llama")
    if not isinstance(model, library.LlamaForCausalLM):
        need, remedy = "a LlamaForCausalLM", "Other models of the library are not served."
        raise Reason("model", "a " + type(model).__name__, need, remedy).error(LAYER)
    for name, needed in (("use_flash_attention", True), ("use_past", False), ("use_ring_attention", False)):
        if getattr(model.config, name) is not needed:
            remedy = "Build the model with {}={}.".format(name, needed)
            raise Reason(name, str(getattr(model.config, name)), str(needed), remedy).error(LAYER)
