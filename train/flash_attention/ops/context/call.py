"""From a rank's tensors to the Cell that attends over the group: checks, plan, placement.

Shapes and options decide everything; a ``constexpr`` builds the Cell once for them, as for ``ops.flash_attention``.
"""

import functools
from dataclasses import replace

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.functional import depend
from mindspore.ops.primitive import constexpr

from flash_attention.core import context
from flash_attention.core.errors import invalid_value
from flash_attention.core.spec import Operands
from flash_attention.core.validation import Options, TensorInfo, make_spec
from flash_attention.ops.collectives import choose, current_group
from flash_attention.ops.context.moves import Place, PlaceRows, Return, Trade, TradeBack
from flash_attention.ops.context.ring import Ring
from flash_attention.ops.engines import ENGINES
from flash_attention.ops.functional import computable, describe, info, keep

STRATEGIES = ("ring", "ulysses")
_NAMES = ("query", "key", "value", "mask", "alibi_slopes", "dropout_seed")


def context_attention(layer, strategy, query, key, value, mask, slopes, seed, options, engine=None, group=None):
    """Attention over the group's whole sequence, of which each rank gives and gets its contiguous share.

    Args:
        layer (str): name used in messages.
        strategy (str): 'ring' or 'ulysses'.
        query (Tensor): (B, N, s, D), s queries of this rank, as many on every rank; key, value: (B, Nkv, t, D).
        mask (Tensor): keep where True or > 0, (1|B, 1|N, 1|s, all keys), this rank's rows; or None.
        slopes (Tensor): (N,) or (B, N), of all heads; or None. Its gradient is this rank's queries' share.
        seed (Tensor): of dropout, the same on every rank; or None.
        options (tuple): fields of ``core.validation.Options``, as in ``ops.flash_attention``; layout 'BNSD'.
        engine (str): as in ``ops.flash_attention``. group (str): name of the communication group; None = all ranks.

    Returns:
        (out (B, N, s, D) in the query's dtype, lse (B, N, s) float32).
    """
    shapes, dtypes = describe(layer, _NAMES, (query, key, value, mask, slopes, seed))
    cell = _resolve(layer, strategy, shapes, dtypes, options, engine, group)
    kept = None if mask is None else keep(mask).astype(mstype.float32)
    pair = ops.concat((computable(key), computable(value)), -1)
    out, lse = cell(computable(query), pair, kept, slopes, seed)
    return out.astype(query.dtype), lse


@constexpr
def _resolve(layer, strategy, shapes, dtypes, options, engine, name):
    """The Cell ``(query, pair, mask, slopes, seed) -> (out, lse)`` of one call."""
    group = current_group(name)
    infos = [None if shape is None else info(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    ENGINES.check_name(engine, layer)
    spec = _whole_spec(layer, infos, Options(*options), group.size)
    if min(spec.batch, spec.q_len, spec.kv_len) < 0:
        raise invalid_value(layer, "query", "of static shape", "shape {}".format(shapes[0]))
    refusal = {"ring": context.ring_refusal, "ulysses": context.ulysses_refusal}[strategy](spec, group.size)
    if refusal is not None:
        raise refusal.error(layer)
    return _build(strategy, spec, group, engine, layer)


def _whole_spec(layer, infos, options, ranks):
    """The spec of all ranks' tokens."""
    query, key, value, mask, slopes, seed = infos

    def longer(x):
        shape = tuple(size * ranks if axis == 2 else size for axis, size in enumerate(x.shape))
        return TensorInfo(shape, x.dtype)

    query, key, value = (longer(x) for x in (query, key, value))
    if mask is not None:
        if len(mask.shape) != 4:
            raise invalid_value(layer, "mask", "of rank 4, (1|B, 1|N, 1|s, all keys)", "shape {}".format(mask.shape))
        mask = longer(mask) if mask.shape[2] != 1 else mask
    spec = make_spec(layer, query, key, value, Operands(mask=mask, slopes=slopes, dropout_seed=seed), options)
    if spec.dtype in ("float16", "bfloat16") and ms.get_context("device_target") == "CPU":
        return replace(spec, dtype="float32")  # as `computable` makes the tensors
    return spec


@functools.lru_cache(maxsize=64)
def _build(strategy, spec, group, engine, layer):
    def cell_of(part):
        return ENGINES.choose(part, engine, layer).run.cell(part)

    if group.size == 1:
        return _OverHeads(spec, group, None, cell_of)
    return {"ring": _OverRing, "ulysses": _OverHeads}[strategy](spec, group, choose(), cell_of)


class _OverRing(nn.Cell):
    """Placement, ring, and back."""

    def __init__(self, spec, group, back_end, cell_of):
        super().__init__(auto_prefix=False)
        plan, dtype = context.make_ring_plan(spec, group.size), getattr(mstype, spec.dtype)
        q_shape = (spec.batch, spec.heads, spec.q_len // group.size, spec.head_dim)
        kv_shape = (spec.batch, spec.kv_heads, spec.kv_len // group.size, 2 * spec.head_dim)
        self.ring = Ring(plan, group, back_end, cell_of, kv_shape, dtype)
        self.zigzag, self.place_mask = plan.zigzag, None
        if plan.zigzag:
            self.place = Place(plan, group, back_end, q_shape, kv_shape, dtype)
            self.back = Return(plan, group, back_end, q_shape, dtype)
            if spec.mask_shape is not None and spec.mask_shape[2] > 1:
                rows = spec.mask_shape[:2] + (q_shape[2], spec.mask_shape[3])
                self.place_mask = PlaceRows(plan, group, back_end, rows, mstype.float32)

    def construct(self, query, pair, mask, slopes, seed):
        if self.zigzag:
            query, pair = self.place(query, pair)
            if self.place_mask is not None:
                mask = self.place_mask(depend(mask, pair))
                pair = depend(pair, mask)
        results = self.ring(query, pair, mask, slopes, seed)
        out, lse = results[0], results[1]
        if self.zigzag:
            out, lse = self.back(out, ops.expand_dims(lse, -1))
            lse = lse[..., 0]
        return out, lse


class _OverHeads(nn.Cell):
    """Ulysses (Jacobs et al., 2023): the core call on all tokens and this rank's heads. A single rank has them all."""

    def __init__(self, spec, group, back_end, cell_of):
        super().__init__(auto_prefix=False)
        heads = spec.heads // group.size
        first, split_kv = group.rank * heads, spec.kv_heads % group.size == 0
        kv_heads = spec.kv_heads // group.size if split_kv else context.heads_needed(heads, spec.group)
        self.spread = group.size > 1
        if self.spread:
            self.trade, self.trade_back = Trade(group, back_end, split_kv), TradeBack(group, back_end)
        self.own = None
        if not split_kv:
            self.own = Tensor(
                [(first + head) // spec.group for head in range(heads if kv_heads > 1 else 1)], mstype.int32
            )
        part = context.part_of(spec, (0, first, 0, 0), (spec.q_len, spec.kv_len), heads=heads, kv_heads=kv_heads)
        self.attend = cell_of(part)
        self.head_dim, self.first, self.stop = spec.head_dim, first, first + heads
        self.mask_heads = self.spread and spec.mask_shape is not None and spec.mask_shape[1] > 1
        self.gather_mask = None
        if self.spread and spec.mask_shape is not None and spec.mask_shape[2] > 1:
            self.gather_mask = back_end.AllGather(group, 2)

    def construct(self, query, pair, mask, slopes, seed):
        if self.gather_mask is not None:
            mask = self.gather_mask(mask)
            query = depend(query, mask)
        if self.spread:
            query, pair = self.trade(query, pair)
        if self.own is not None:
            pair = ops.gather(pair, self.own, 1)
        if self.mask_heads:
            mask = mask[:, self.first : self.stop]
        if mask is not None:
            mask = mask > 0
        if slopes is not None:
            slopes = slopes[..., self.first : self.stop]
        out, lse = self.attend(
            query, pair[..., : self.head_dim], pair[..., self.head_dim :], None, mask, slopes, None, None, None, None,
            None, None, seed,
        )  # fmt: skip
        if self.spread:
            out, lse = self.trade_back(out, ops.expand_dims(lse, -1))
            lse = lse[..., 0]
        return out, lse
