"""What the libraries share: a model whose attention leads to our cache while a ``with`` block lasts."""

import mindspore as ms
from mindspore import Tensor

from flash_attention.core.errors import Reason, invalid_value
from flash_attention.integrations.patching import Patches
from flash_attention.ops.engines import ENGINES


class CachedModel:
    """The ``forward`` of ``generate``, ``stream`` and ``Scheduler`` for a library's model, in PyNative mode.

    Inside its ``with`` block the model may be run by this object alone; afterwards it has its own attention again.
    A subclass patches the model (:meth:`patch`) and calls it (:meth:`logits`); its attention is :meth:`attend`.

    Args:
        layer (str): name used in messages.
        model (Cell), cache (KVCache), engine (str): as given by the user.
        layers (int): of the model.
    """

    def __init__(self, layer, model, cache, engine, layers):
        ENGINES.check_name(engine, layer)
        if cache.config.layers != layers:
            need = "a cache of the model's {} layers".format(layers)
            raise invalid_value(layer, "cache", need, "one of {}".format(cache.config.layers))
        self.layer, self.model, self.cache, self.engine = layer, model, cache, engine
        self._step, self._visited, self._patches = None, 0, Patches()

    def patch(self, patches):
        """Lead the model's attention to :meth:`attend`."""
        raise NotImplementedError

    def logits(self, tokens, positions, last):
        """Logits (B, V) of a call of the model.

        Args:
            tokens, positions (numpy.ndarray): int32 (B, T).
            last (Tensor): int (B,), which of the B * T tokens they are of.
        """
        raise NotImplementedError

    def __enter__(self):
        if ms.get_context("mode") != ms.PYNATIVE_MODE:
            raise Reason("mode", "graph mode", "PyNative mode", "Call mindspore.set_context first.").error(self.layer)
        try:
            self.patch(self._patches)
        except Exception:
            self._patches.undo()
            raise
        self.model.set_train(False)
        return self

    def __exit__(self, *_):
        self._patches.undo()

    def __call__(self, tokens, positions, step):
        """Logits (B, V) of each sequence's last new token; arguments: :class:`Scheduler`."""
        self._step, self._visited = step, 0
        return self.logits(tokens, positions, Tensor(step.last))

    def attend(self, query, key, value, window=None, **options):
        """Attention (B, T, N, D) of the next layer, from query (B, N, T, D) and key, value (B, Nkv, T, D).

        The library's masks know no cache of ours and go unread: what a query sees follows from the step.
        ``window``: how many tokens a query sees, itself included; ``options`` are those of ``KVCache.prefill``.
        """
        number, self._visited = self._visited, self._visited + 1
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        return self.cache.prefill(
            number, self._step, query, key, value, engine=self.engine,
            local_window_size=None if window is None else (window - 1, 0), **options
        )  # fmt: skip
