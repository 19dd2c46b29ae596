"""Training steps of model libraries as candidates: 'MODEL eager' is the library's own attention, else our engine.

The worker of a library runs in that library's environment. Libraries made for Ascend lack operators on the CPU; the
module that FLASH_BENCH_PREPARE names is imported first and may supply them.
"""

import importlib
import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from flash_attention.tools.bench.cases import SEED
from flash_attention.tools.bench.in_mindspore import limits

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
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model, loss_of = MODELS[name](case, None if attention == "eager" else attention)
    model.set_train()
    optimizer = nn.AdamWeightDecay(model.trainable_params(), 1e-4)
    step = ms.value_and_grad(loss_of, None, optimizer.parameters)
    tokens = np.random.default_rng(SEED).integers(0, VOCABULARY, (case.batch, case.q_len + 1))
    tokens = Tensor(tokens.astype(np.int32))

    def call():
        loss, gradients = step(tokens)
        optimizer(gradients)
        loss.asnumpy()

    return call, lambda: (None, None)  # the tests judge the results


def _mindformers_llama(case, engine):
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    from flash_attention.integrations import mindformers

    mindformers.disable()
    if engine is not None:
        mindformers.enable(engine)
    dtypes = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type")
    config = LlamaConfig(
        batch_size=case.batch,
        seq_length=case.q_len,
        vocab_size=VOCABULARY,
        hidden_size=case.heads * case.head_dim,
        num_layers=LAYERS,
        num_heads=case.heads,
        n_kv_heads=case.kv_heads or case.heads,
        intermediate_size=2 * case.heads * case.head_dim,
        max_position_embedding=case.q_len,
        use_past=False,
        use_rope_slice=True,
        fused_rms_norm=False,
        use_flash_attention=engine is not None,
        **{name: case.dtype for name in dtypes}
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return model, model


def _mindone_model(config, model_class, engine):
    from flash_attention.integrations import mindone

    mindone.disable()
    config._attn_implementation = "eager"
    if engine is not None:
        mindone.enable("flash_910", engine)
        config._attn_implementation = "flash_910"

    model = model_class(config)

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False, return_dict=False)[0]

    return model, loss_of


def _mindone_llama(case, engine):
    from mindone.transformers.models.llama.modeling_llama import LlamaForCausalLM
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.heads * case.head_dim,
        intermediate_size=2 * case.heads * case.head_dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads or case.heads,
        max_position_embeddings=case.q_len + 1,
    )
    return _mindone_model(config, LlamaForCausalLM, engine)


def _mindone_bloom(case, engine):
    from mindone.transformers.models.bloom.modeling_bloom import BloomForCausalLM
    from transformers import BloomConfig

    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=case.heads * case.head_dim, n_layer=LAYERS, n_head=case.heads
    )
    return _mindone_model(config, BloomForCausalLM, engine)


# {name: function(case, engine or None) -> (model, function of tokens (B, S + 1) that gives the loss)}
MODELS = {"LLaMA": _mindformers_llama, "llama": _mindone_llama, "bloom": _mindone_bloom}
