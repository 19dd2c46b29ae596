"""Training steps of model libraries as candidates: 'MODEL eager' is the library's own attention, else our engine.

The worker of a library runs in that library's environment. Libraries made for Ascend lack operators on the CPU; the
module that FLASH_BENCH_PREPARE names is imported first and may supply them.
"""

import functools
import importlib
import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from flash_attention.tools.bench.cases import SEED
from flash_attention.tools.bench.in_mindspore import limits
from flash_attention.tools.bench.suite_integration import OWN

__all__ = ["build", "limits"]  # what a worker asks its module for
LAYERS, VOCABULARY = 2, 256

if os.environ.get("FLASH_BENCH_PREPARE"):
    importlib.import_module(os.environ["FLASH_BENCH_PREPARE"])


def build(case, direction, candidate, arrays):
    """``(call, results)``: ``call()`` is one training step: forward, backward, AdamW.

    Args:
        case: sizes of the attention; the model has ``LAYERS`` layers of it.
        direction: 'fwd+bwd'.
        candidate: 'MODEL ATTENTION', MODEL a key of ``MODELS``, ATTENTION 'eager' or an engine's name.
        arrays: not used, a model makes its own queries.
    """
    del arrays
    if direction != "fwd+bwd":
        raise ValueError("a training step is 'fwd+bwd', but got '{}'".format(direction))
    name, attention = candidate.split()
    # Synchronous: on few cores the faster way, for either attention.
    ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=True)
    model, loss_of = MODELS[name](case, attention)
    model.set_train()
    optimizer = nn.AdamWeightDecay(model.trainable_params(), 1e-4)
    step = ms.value_and_grad(loss_of, None, optimizer.parameters)
    tokens = np.random.default_rng(SEED).integers(1, VOCABULARY, (case.batch, case.q_len + 1))  # 0 may be padding
    tokens = Tensor(tokens.astype(np.int32))

    def call():
        loss, gradients = step(tokens)
        optimizer(gradients)
        loss.asnumpy()

    return call, lambda: (None, None)  # the tests judge the results


# --- mindformers ------------------------------------------------------------------------------------
def _mindformers_model(model_class, config_class, case, attention, **changes):
    """The model and its loss, of tokens (B, S + 1)."""
    from flash_attention.integrations import mindformers

    mindformers.disable()  # models that exist keep theirs
    if attention != OWN:
        mindformers.enable(attention)
    dtypes = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "param_init_type")
    config = config_class(
        batch_size=case.batch,
        seq_length=case.q_len,
        vocab_size=VOCABULARY,
        hidden_size=case.heads * case.head_dim,
        num_layers=LAYERS,
        num_heads=case.heads,
        use_past=False,
        use_flash_attention=attention != OWN,
        **dict(dict.fromkeys(dtypes, case.dtype), **changes)
    )  # fmt: skip
    model = model_class(config)
    return model, model


def _mindformers_llama(case, attention):
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    return _mindformers_model(
        LlamaForCausalLM,
        LlamaConfig,
        case,
        attention,
        n_kv_heads=case.kv_heads,
        intermediate_size=2 * case.heads * case.head_dim,
        max_position_embedding=case.q_len,
        rotary_dtype=case.dtype,
        use_rope_slice=True,
        fused_rms_norm=False,
    )


def _mindformers_bloom(case, attention):
    from mindformers.models.bloom import BloomConfig, BloomLMHeadModel

    rates = ("hidden_dropout_rate", "attention_dropout_rate")
    changes = dict(dict.fromkeys(rates, 0.0), embedding_init_type=case.dtype)
    return _mindformers_model(BloomLMHeadModel, BloomConfig, case, attention, **changes)


# --- mindone ------------------------------------------------------------------------------------------
def _grouped(case):
    width = 2 * case.heads * case.head_dim
    return dict(num_key_value_heads=case.kv_heads, intermediate_size=width, max_position_embeddings=case.q_len)


def _gpt2(case):
    rates = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
    return dict(dict.fromkeys(rates, 0.0), max_position_embeddings=case.q_len)


# {name: (model class, configuration class, function of the case that gives what all models do not share)}
_MINDONE = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _grouped),
    "mistral": ("MistralForCausalLM", "MistralConfig", _grouped),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _grouped),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2),
    "mpt": ("MptForCausalLM", "MptConfig", lambda case: {"max_seq_len": case.q_len}),
    "falcon": ("FalconForCausalLM", "FalconConfig", lambda case: {"alibi": True, "multi_query": False}),
    "bloom": ("BloomForCausalLM", "BloomConfig", lambda case: {}),
}


@functools.lru_cache(maxsize=None)
def _mindone_name(attention):
    """The name by which models find ``attention`` at each call; it stays, for the models that use it."""
    from flash_attention.integrations import mindone

    if attention == OWN:
        return OWN
    name = "flash_" + attention
    mindone.enable(name, attention)
    return name


def _mindone_model(name, case, attention):
    """The model and its loss, of tokens (B, S + 1), the last of which is left out: the model shifts its labels."""
    model_class, config_class, options = _MINDONE[name]
    models = importlib.import_module("mindone.transformers.models.{0}.modeling_{0}".format(name))
    config = getattr(importlib.import_module("transformers"), config_class)(
        vocab_size=VOCABULARY,
        hidden_size=case.heads * case.head_dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.heads,
        use_cache=False,
        **options(case)
    )  # fmt: skip
    config._attn_implementation = _mindone_name(attention)
    model = getattr(models, model_class)(config)

    def loss_of(tokens):
        tokens = tokens[:, : case.q_len]
        return model(input_ids=tokens, labels=tokens, return_dict=False)[0]

    return model, loss_of


# {name: function(case, attention) -> (model, function of tokens (B, S + 1) that gives the loss)}
MODELS = {"LLaMA": _mindformers_llama, "BLOOM": _mindformers_bloom}
MODELS.update((name, functools.partial(_mindone_model, name)) for name in _MINDONE)
