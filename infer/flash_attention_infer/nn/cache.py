"""KVCache in MindSpore: the table of the core, and a LayerCache and its attention a layer."""

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from flash_attention.core import sampling as shared
from flash_attention.core.spec import NO_LIMIT
from flash_attention.ops.functional import on_cpu
from flash_attention.ops.sampling import sample
from flash_attention_infer.core.cache import KVCache as Base
from flash_attention_infer.nn.attention import CachedAttention
from flash_attention_infer.nn.storage import LayerCache


class KVCache(Base):
    """A KV cache whose Parameters live in ``layers``, a list of :class:`LayerCache`; they are written in place.

    ``cache.prefill(n, step, q, k, v)`` runs a :class:`CachedAttention` over ``cache.layers[n]``.
    In a Cell of your own, build ``CachedAttention(cache.layers[n], ...)`` and hand it ``tensors(step)``. Make a cache
    with :meth:`paged`, :meth:`contiguous` or :meth:`sliding`.
    """

    def __init__(self, config, on_shortage=None):
        super().__init__(config, on_shortage)
        self.layers = [LayerCache(config, "cache.{}".format(n)) for n in range(config.layers)]
        self._cells = {}
        self._step, self._tensors = None, None

    def copy_blocks(self, pairs):
        """Copy blocks (from, to) in every layer."""
        for layer in self.layers:
            layer.copy_blocks(Tensor(pairs))

    def prefill(
        self, layer, step, query, key, value, scale=None, local_window_size=None, alibi_slopes=None,
        logits_soft_cap=None, sinks=None, engine=None, prev_block_num=NO_LIMIT, block_size=128,
    ):  # fmt: skip
        """Write the step's tokens into layer number ``layer``; arguments, output: :class:`CachedAttention`."""
        cell = self._cell(layer, scale, local_window_size, logits_soft_cap, engine, prev_block_num, block_size)
        return cell(query, key, value, *self._tensors_of(step), alibi_slopes, sinks, step.fresh, 1)

    def decode(
        self, layer, step, query, key, value, scale=None, local_window_size=None, alibi_slopes=None,
        logits_soft_cap=None, sinks=None, num_splits=1, engine=None, prev_block_num=NO_LIMIT, block_size=128,
    ):  # fmt: skip
        """:meth:`prefill` for few tokens a sequence, which may split the keys into ``num_splits`` parts."""
        cell = self._cell(layer, scale, local_window_size, logits_soft_cap, engine, prev_block_num, block_size)
        return cell(query, key, value, *self._tensors_of(step), alibi_slopes, sinks, False, num_splits)

    def sample(self, logits, seeds, positions, **sampling):
        """``flash_attention.ops.sampling.sample`` with the tokens as numpy.

        On the CPU numpy draws them, the same ones: sixty operators, small as they are, take longer than a small model.
        """
        if not on_cpu():
            return sample(logits, Tensor(seeds), Tensor(positions), **sampling).asnumpy()
        shared.check_logits(logits.shape)
        logits = logits.astype(mstype.float32).asnumpy()
        return shared.sample(np, logits, seeds, positions, shared.Sampling(**sampling))

    def _cell(self, layer, *options):
        key = (layer,) + options
        if key not in self._cells:
            self._cells[key] = CachedAttention(self.layers[layer], *options)
        return self._cells[key]

    def _tensors_of(self, step):
        """``tensors(step)``, made once for all layers."""
        if self._step is not step:
            self._step, self._tensors = step, tensors(step)
        return self._tensors


def tensors(step):
    """The step's arrays in the order of :class:`CachedAttention`'s inputs: Tensors, or None where absent or empty."""
    arrays = (step.starts, step.counts, step.slots, step.tables, step.history, step.sinks)
    return tuple(None if x is None or not x.size else Tensor(x) for x in arrays)
