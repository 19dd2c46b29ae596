"""``mindone.transformers``: attention of its language models by the functional core of our Cell.

    from flash_attention.integrations import mindone
    mindone.enable("flash_910")                              # before the model is built
    config._attn_implementation = "flash_910"

LLaMA, Mistral, Qwen2 and others find the function in the library's registry. BLOOM, MPT, Falcon and GPT-2 have classes
instead: `mindone_models.py`, chosen by the same name.
"""

import importlib

from mindspore import dtype as mstype
from mindspore import ops
from mindspore.ops.primitive import constexpr

from flash_attention.core.errors import Reason, invalid_type, invalid_value
from flash_attention.integrations.patching import Patches, check_version
from flash_attention.nn.layer.seeded import seed_from
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import flash_attention

LAYER = "flash_attention.integrations.mindone"
TESTED = ("0.5.0",)
_DONE = ("position_ids", "use_cache", "cache_position", "return_dict", "output_hidden_states")
"""Arguments of the model that it hands down; they have done their work, or do it elsewhere."""
_NO_WEIGHTS = "The softmax weights are never formed; use the library's own attention for that."
_PACKED = "Give the whole mask instead."


def attend(
    query,
    key,
    value,
    mask=None,
    bias=None,
    *,
    scale,
    causal,
    dropout=0.0,
    window=None,
    soft_cap=None,
    sinks=None,
    engine=None
):  # fmt: skip
    """One attention call in the library's terms.

    Args:
        query (Tensor): (B, N, Sq, D); key, value (Tensor): (B, Nkv, Sk, D).
        mask (Tensor): None, **non-zero = keep** (B, Sk), bool keep (B, 1, Sq, Sk), or float to be added (B, 1|N, 1|Sq,
            Sk or more: cut to the keys).
        bias (Tensor): None or (1|B, N, 1, Sk), added to the scaled scores.
        scale (float): factor on the scores; None = 1 / sqrt(D).
        causal (bool): bottom-right aligned, beside the mask.
        dropout (float): on the softmax weights, acts as given.
        window (int): None, or how many tokens a query sees, itself included.
        soft_cap (float), sinks (Tensor), engine (str): as in :func:`flash_attention.ops.flash_attention`.

    Returns:
        Tensor (B, Sq, N, D).
    """
    keep = None
    if mask is not None and mask.ndim == 2:
        keep = (mask != 0)[:, None, None, :]
    elif mask is not None and mask.dtype == mstype.bool_:
        keep = mask[..., : key.shape[2]]
    elif mask is not None:
        added = mask[..., : key.shape[2]].astype(mstype.float32)
        bias = added if bias is None else added + bias
    out = flash_attention(
        query,
        key,
        value,
        bias,
        keep,
        scale=scale,
        is_causal=causal,
        local_window_size=_window(window),
        engine=engine,
        dropout_rate=dropout,
        dropout_seed=seed_from(query) if dropout > 0 else None,
        logits_soft_cap=soft_cap,
        sinks=sinks,
        layout="BNSD",
    )
    return out.swapaxes(1, 2)


@constexpr(check=False)
def _window(tokens):
    return None if tokens is None else (tokens - 1, None)


@constexpr(check=False)
def refuse(names, values):
    """Raise for the first of the arguments ``names`` whose value is neither None nor False."""
    for name, value in zip(names, values):
        if value is not None and value is not False:
            remedy = _NO_WEIGHTS if name in ("output_attentions", "head_mask") else _PACKED
            raise Reason(name, "True" if value is True else "a value", "None or False", remedy).error(LAYER)


def registered(engine):
    """The function for the library's registry: ``(output (B, Sq, N, D), None)``."""

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        dropout=0.0,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        is_causal=None,
        output_attentions=None,
        head_mask=None,
        cu_seq_lens_q=None,
        cu_seq_lens_k=None,
        **others
    ):  # fmt: skip
        refuse(
            ("output_attentions", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k"),
            (output_attentions, head_mask is not None, cu_seq_lens_q is not None, cu_seq_lens_k is not None),
        )
        refuse_unknown(tuple([name for name in others if others[name] is not None]))
        whole = attention_mask is not None and attention_mask.ndim == 4
        causal = (module.is_causal if is_causal is None else is_causal) and not whole
        out = attend(
            query,
            key,
            value,
            attention_mask,
            scale=scaling,
            causal=causal,
            dropout=dropout,
            window=sliding_window,
            soft_cap=softcap,
            sinks=s_aux,
            engine=engine,
        )
        return out, None

    return attention


@constexpr(check=False)
def refuse_unknown(names):
    """Raise for the first of the arguments ``names``, of those given, that has not done its work elsewhere."""
    for name in names:
        if name not in _DONE:
            raise Reason(name, "a value", "absent", "This attention function does not know it.").error(LAYER)


# --- masks ------------------------------------------------------------------------------------------
def mask_for_causal(causal_mask_function):
    """The function for the library's registry of masks: what :func:`attend` needs, without (Sq, Sk) where it can be."""

    def mask(batch_size, cache_position, kv_length, kv_offset=0, mask_function=None, attention_mask=None, **_):
        if mask_function is causal_mask_function and kv_offset == 0:
            return attention_mask
        rows = cache_position.reshape(1, 1, -1, 1)
        columns = (ops.arange(kv_length) + kv_offset).reshape(1, 1, 1, -1)
        batches, heads = ops.arange(batch_size).reshape(-1, 1, 1, 1), ops.arange(1).reshape(1, 1, 1, 1)
        keep = mask_function(batches, heads, rows, columns)
        if attention_mask is not None:
            keep = ops.logical_and(keep, attention_mask[:, None, None, kv_offset : kv_offset + kv_length] != 0)
        return keep

    return mask


def short_mask(original, name, dynamic_cache):
    """A model's ``_update_causal_mask`` that leaves causality to ``attend``, where only that and padding are asked."""

    def _update_causal_mask(
        self, attention_mask, input_tensor, cache_position, past_key_values, output_attentions=False, *more
    ):
        mine = self.config._attn_implementation == name
        if mine and _only_padding(attention_mask, more) and (
            past_key_values is None or isinstance(past_key_values, dynamic_cache)
        ):  # fmt: skip
            return attention_mask
        return original(self, attention_mask, input_tensor, cache_position, past_key_values, output_attentions, *more)

    return _update_causal_mask


def _only_padding(attention_mask, more):
    """No mask or (B, Sk); and nothing that the model would write into the mask (Falcon: head_mask, alibi)."""
    return (attention_mask is None or attention_mask.ndim == 2) and all(item is None for item in more)


# --- in the library -------------------------------------------------------------------------------
_ENABLED = []


def enable(name="flash_910", engine=None, any_version=False):
    """Let models whose configuration says ``_attn_implementation = name`` compute their attention with our core.

    Args:
        name (str): free in the library's registry.
        engine (str): None = the best one here.
        any_version (bool): also patch a version of the library that was not tested.

    Returns:
        a context manager that takes everything back at its end; :func:`disable` does it without one.

    Raises:
        UnsupportedError: the library's version was not tested; the message names those that were.
        ValueError: the name is taken.
    """
    library = importlib.import_module("mindone")
    check_version(LAYER, library, TESTED, any_version)
    ENGINES.check_name(engine, LAYER)
    if not isinstance(name, str):
        raise invalid_type(LAYER, "name", "a str", type(name).__name__)
    masks = importlib.import_module("mindone.transformers.masking_utils")
    functions = importlib.import_module("mindone.transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    if name in ["eager"] + list(functions.valid_keys()):
        raise invalid_value(LAYER, "name", "a name that the library does not know yet", repr(name))
    models = importlib.import_module("flash_attention.integrations.mindone_models")
    patches = Patches()
    patches.put(functions._global_mapping, name, registered(engine))
    shortened = mask_for_causal(masks.causal_mask_function)
    patches.put(masks.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, shortened)
    models.patch(patches, name, engine)
    _ENABLED.append(patches)
    return patches


def disable():
    """Take every :func:`enable` back."""
    while _ENABLED:
        _ENABLED.pop().undo()
