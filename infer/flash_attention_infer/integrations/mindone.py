"""``mindone.transformers``: generation with our caches for its language models (LLaMA, Mistral, Qwen2).

    from flash_attention_infer.integrations.mindone import CachedModel
    with CachedModel(model, cache) as forward:
        tokens = generate(forward, cache, prompts, max_new_tokens=32)

The models take their attention by name from the library's registry. While a step runs, that name leads to the cache:
it writes the layer's new keys and values and attends to all of them. The library's own cache stays empty.
"""

import importlib

from mindspore import Tensor, ops

from flash_attention.core.errors import Reason, invalid_value
from flash_attention.integrations.mindone import TESTED, refuse, refuse_unknown
from flash_attention.integrations.patching import Patches, check_version
from flash_attention.ops.engines import ENGINES

LAYER = "flash_attention_infer.integrations.mindone"
_NAME = "flash_attention_infer"


class CachedModel:
    """The ``forward`` of ``generate``, ``stream`` and ``Scheduler`` for a model of the library, in PyNative mode.

    Inside its ``with`` block the model may be run by this object alone; afterwards it has its own attention again.

    Args:
        model (Cell): a causal language model whose attention comes from the library's registry.
        cache (KVCache): of ``flash_attention_infer.nn``, with the model's layers, key/value heads and head size.
        engine (str): None = the best one here.
        any_version (bool): also take a version of the library that was not tested.

    Raises:
        UnsupportedError: the library's version was not tested, or a layer of the model asks for what is not served.
        ValueError: the cache has another number of layers than the model.
    """

    def __init__(self, model, cache, engine=None, any_version=False):
        check_version(LAYER, importlib.import_module("mindone"), TESTED, any_version)
        ENGINES.check_name(engine, LAYER)
        layers = model.config.num_hidden_layers
        if cache.config.layers != layers:
            need = "a cache of the model's {} layers".format(layers)
            raise invalid_value(LAYER, "cache", need, "one of {}".format(cache.config.layers))
        self.model, self.cache, self.engine = model, cache, engine
        self._step, self._visited, self._patches = None, 0, Patches()

    def __enter__(self):
        functions = importlib.import_module("mindone.transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        masks = importlib.import_module("mindone.transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
        if _NAME in functions.valid_keys():
            raise Reason("model", "a second one", "alone", "Leave the 'with' block of the first.").error(LAYER)
        self._patches.put(functions._global_mapping, _NAME, self._attention)
        self._patches.put(masks._global_mapping, _NAME, lambda *_, **__: None)
        self._own = self.model.config._attn_implementation
        self.model.config._attn_implementation = _NAME
        self.model.set_train(False)
        return self

    def __exit__(self, *_):
        self.model.config._attn_implementation = self._own
        self._patches.undo()

    def __call__(self, tokens, positions, step):
        """Logits (B, V) of each sequence's last new token; arguments: :class:`Scheduler`."""
        self._step, self._visited = step, 0
        found = self.model(
            input_ids=Tensor(tokens), position_ids=Tensor(positions), use_cache=False, return_dict=False
        )  # fmt: skip
        if self._visited != self.cache.config.layers:
            need, remedy = "taken from the library's registry by each layer", "Give a model that does, like LLaMA."
            got = "{} of {}".format(self._visited, self.cache.config.layers)
            raise Reason("attention", got, need, remedy).error(LAYER)
        logits = found[0]
        return ops.gather(ops.reshape(logits, (-1, logits.shape[-1])), Tensor(step.last), 0)

    def _attention(
        self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
        s_aux=None, output_attentions=None, head_mask=None, **others
    ):  # fmt: skip
        """The registry's function: ``(output (B, T, N, D), None)`` from heads-first tensors.

        The library's mask knows no cache of ours and goes unread: which tokens a query sees follows from the step.
        Dropout is 0 outside of training.
        """
        refuse(("output_attentions", "head_mask"), (output_attentions, head_mask is not None))
        refuse_unknown(tuple(name for name in others if others[name] is not None))
        self._visited += 1
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        out = self.cache.prefill(
            module.layer_idx, self._step, query, key, value, scale=scaling, logits_soft_cap=softcap, sinks=s_aux,
            local_window_size=None if sliding_window is None else (sliding_window - 1, 0), engine=self.engine,
        )  # fmt: skip
        return out, None
