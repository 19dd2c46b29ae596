"""``mindone.transformers``: generation with our caches for its language models.

    from flash_attention_infer.integrations.mindone import CachedModel
    with CachedModel(model, cache) as forward:
        tokens = generate(forward, cache, prompts, max_new_tokens=32)

LLaMA, Mistral and Qwen2 take their attention by name from the library's registry; GPT-2, Falcon, MPT and BLOOM have
that of ``flash_attention.integrations.mindone`` when they were built after its ``enable(name)``. While a step runs,
either leads to the cache: it writes the layer's new keys and values and attends to all of them. The library's own cache
stays empty.
"""

import importlib
import inspect

import mindspore as ms
from mindspore import Tensor, ops

from flash_attention.core.errors import Reason
from flash_attention.integrations.mindone import TESTED, refuse, refuse_unknown
from flash_attention.integrations.patching import check_version
from flash_attention_infer.integrations import cached

LAYER = "flash_attention_infer.integrations.mindone"
_NAME = "flash_attention_infer"


class CachedModel(cached.CachedModel):
    """The ``forward`` of ``generate``, ``stream`` and ``Scheduler`` for a model of the library, in PyNative mode.

    Inside its ``with`` block the model may be run by this object alone; afterwards it has its own attention again.

    Args:
        model (Cell): a causal language model of the library, see above; Falcon with rotary positions only.
        cache (KVCache): of ``flash_attention_infer.nn``, with the model's layers, key/value heads and head size.
        engine (str): None = the best one here.
        any_version (bool): also take a version of the library that was not tested.

    Raises:
        UnsupportedError: the library's version was not tested, or a layer of the model asks for what is not served.
        ValueError: the cache has another number of layers than the model.
    """

    def __init__(self, model, cache, engine=None, any_version=False):
        check_version(LAYER, importlib.import_module("mindone"), TESTED, any_version)
        super().__init__(LAYER, model, cache, engine, model.config.num_hidden_layers)
        self._takes_positions = "position_ids" in inspect.signature(model.construct).parameters
        self._slopes = None

    def patch(self, patches):
        """The registry's name for this, and the ``attend`` of our attention classes."""
        functions = importlib.import_module("mindone.transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        masks = importlib.import_module("mindone.transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
        if _NAME in functions.valid_keys():
            raise Reason("model", "a second one", "alone", "Leave the 'with' block of the first.").error(LAYER)
        patches.put(functions._global_mapping, _NAME, self._registered)
        patches.put(masks._global_mapping, _NAME, lambda *_, **__: None)
        classes = importlib.import_module("flash_attention.integrations.mindone_models")
        patches.set(classes, "attend", self._of_classes)
        patches.set(self.model.config, "_attn_implementation_internal", _NAME)  # what the property reads

    def logits(self, tokens, positions, last):
        """One call of the model without its own cache."""
        more = {"position_ids": Tensor(positions)} if self._takes_positions else {}
        found = self.model(input_ids=Tensor(tokens), use_cache=False, return_dict=False, **more)[0]
        if self._visited != self.cache.config.layers:
            need = "the registry's, or that of flash_attention.integrations.mindone, in each layer"
            remedy = "Build the model after its enable(name), with this name in its configuration."
            got = "another one in {} of {}".format(self.cache.config.layers - self._visited, self.cache.config.layers)
            raise Reason("attention", got, need, remedy).error(LAYER)
        return ops.gather(found.reshape((-1, found.shape[-1])), last, 0)

    def _registered(
        self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
        s_aux=None, output_attentions=None, head_mask=None, **others
    ):  # fmt: skip
        """The registry's function: ``(output (B, T, N, D), None)``. Dropout is 0 outside of training."""
        refuse(("output_attentions", "head_mask"), (output_attentions, head_mask is not None))
        refuse_unknown(tuple(name for name in others if others[name] is not None))
        out = self.attend(
            query, key, value, window=sliding_window, scale=scaling, logits_soft_cap=softcap, sinks=s_aux
        )  # fmt: skip
        return out, None

    def _of_classes(self, query, key, value, mask=None, bias=None, *, scale, causal, dropout=0.0, engine=None):
        """``flash_attention.integrations.mindone.attend`` for the attention classes; their bias is ALiBi."""
        if bias is not None and self._slopes is None:
            self._slopes = _alibi_slopes(self.model)
        return self.attend(query, key, value, scale=scale, alibi_slopes=None if bias is None else self._slopes)


def _alibi_slopes(model):
    """float32 (N,): what the library's ALiBi gains from a key to the next."""
    heads = model.config.num_attention_heads
    if model.config.model_type == "bloom":
        line = model.transformer.build_alibi_tensor(ops.ones((1, 2), ms.float32), heads, ms.float32)
    elif model.config.model_type == "mpt":
        line = model.transformer.build_mpt_alibi_tensor(heads, 2)
    else:
        remedy = "The library adds its ALiBi twice, once in the mask. Give one with alibi=False."
        raise Reason("model", "a Falcon with ALiBi", "one with rotary positions", remedy).error(LAYER)
    line = line.astype(ms.float32).reshape((heads, 2))
    return line[:, 1] - line[:, 0]
