"""Tiny models of two libraries as `training.py` drives them: what to copy into your own fine-tuning.

Three lines matter in each: import the integration, enable it, ask the library for it. Everything else is the library's
own way to build and to train a model.
"""

import dataclasses
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from settings import Schedule

# MindSpore's dispatching thread takes time from the kernels where cores are few: on two, steps took up to three times.
ms.set_context(pynative_synchronize=True)


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Sizes of the model and of its training; bytes are the tokens."""

    vocabulary: int = 256
    layers: int = 2
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    length: int = 1024
    steps: int = 60
    warm_up: int = 10
    learning_rate: float = 1e-3  # with 2e-3 rounding errors grow a thousandfold in ten steps
    held_out_windows: int = 4
    seed: int = 20


def set_weights(model, seed):
    """The same weights in every process, as training from scratch starts: N(0, 1 / inputs), norms 1, biases 0."""
    generator = np.random.default_rng(seed)
    for parameter in model.trainable_params():
        shape = parameter.shape
        if len(shape) == 1:
            value = np.zeros(shape) if parameter.name.endswith(("bias", "beta")) else np.ones(shape)
        else:
            value = generator.standard_normal(shape) / math.sqrt(shape[-1])
        parameter.set_data(Tensor(value, parameter.dtype))


class Trainer:
    """One model in training: AdamW, float32, PyNative. A subclass gives `model` and `loss_of(tokens, targets)`."""

    library = ""

    def __init__(self, settings, attention="flash", engine=None):
        self.engine = "library's own" if attention == "naive" else engine or "auto"
        self.model = self.build(settings, attention == "flash", engine)
        set_weights(self.model, settings.seed)
        parameters = self.model.trainable_params()
        self.optimizer = nn.AdamWeightDecay(parameters, settings.learning_rates())
        self.gradients_of = ms.value_and_grad(self.loss_of, None, parameters)

    @property
    def framework(self):
        """Name and version of the library, and of MindSpore."""
        return "{} {}, MindSpore {}".format(self.library.__name__, self.library.__version__, ms.__version__)

    def step(self, tokens, targets):
        """Update the weights; the loss before the update, nats a byte."""
        self.model.set_train(True)
        loss, gradients = self.gradients_of(Tensor(tokens), Tensor(targets))
        self.optimizer(gradients)
        return float(loss.asnumpy().ravel()[0])

    def loss(self, tokens, targets):
        """The loss without an update."""
        return float(self.loss_of(Tensor(tokens), Tensor(targets)).asnumpy().ravel()[0])


class MindformersLlama(Trainer):
    """LLaMA of mindformers: `use_flash_attention=True` builds the class that the integration has replaced."""

    def build(self, settings, flash, engine):
        import mindformers as library
        from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

        from flash_attention.integrations import mindformers

        self.library = library
        if flash:
            mindformers.enable(engine=engine)
        config = LlamaConfig(
            batch_size=settings.batch,
            seq_length=settings.length,
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            num_layers=settings.layers,
            num_heads=settings.heads,
            n_kv_heads=settings.kv_heads,
            intermediate_size=2 * settings.hidden,
            max_position_embedding=settings.length,
            use_flash_attention=flash,
            **ON_CPU
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def loss_of(self, tokens, targets):
        """Mean cross entropy; the library takes one token more than it predicts."""
        return self.model(ms.ops.cat((tokens, targets[:, -1:]), 1))


ON_CPU = {  # of mindformers' LLaMA: float32, and operators that have CPU kernels
    **{name: "float32" for name in (
        "compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type")},
    "use_past": False, "use_rope_slice": True, "fused_rms_norm": False,
}  # fmt: skip


class MindoneBloom(Trainer):
    """BLOOM of mindone: its attention class is patched while the integration is enabled."""

    def build(self, settings, flash, engine):
        import mindone as library
        import support.mindone_on_cpu  # noqa: F401  (tests/support: operators that a CPU lacks, an error in BLOOM)
        from mindone.transformers.models.bloom.modeling_bloom import BloomForCausalLM
        from transformers import BloomConfig

        from flash_attention.integrations import mindone

        self.library = library
        config = BloomConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            n_layer=settings.layers,
            n_head=settings.heads,
            use_cache=False,
        )
        config._attn_implementation = "eager"
        if flash:
            mindone.enable("flash_910", engine=engine)
            config._attn_implementation = "flash_910"
        return BloomForCausalLM(config)

    def loss_of(self, tokens, targets):
        """Mean cross entropy of the tokens after the first, which the model shifts itself."""
        tokens = ms.ops.cat((tokens, targets[:, -1:]), 1)
        return self.model(input_ids=tokens, labels=tokens, return_dict=False)[0]


TRAINERS = {"mindformers": MindformersLlama, "mindone": MindoneBloom}
