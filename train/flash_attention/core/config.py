"""CellConfig: the checked constructor arguments of ``FlashAttention``, the same for the Cell and its JAX twin.

It also translates the Cell's own conventions (BNSD, non-zero = discard, compact masks, alibi_mask) into a call of
the functional core. No framework here: it sees shapes, not tensors.
"""

from dataclasses import dataclass
from typing import Optional

from flash_attention.core.errors import invalid_type, invalid_value
from flash_attention.core.spec import NO_LIMIT
from flash_attention.core.tiling import get_strategy
from flash_attention.core.validation import (
    FLOATS,
    Options,
    check_bool,
    check_int,
    check_rate,
    check_scale,
    check_window,
)

LAYER = "FlashAttention"


@dataclass(frozen=True)
class CellConfig:
    """Constructor arguments of ``FlashAttention`` in their published order, validated on construction.

    ``head_dim=None`` takes the query's; ``head_num`` is checked against the query when given. ``block_size=None`` takes
    the tiling strategy's own unit: 128 for 'sparse' and 'auto', 64 for 'wukong'. ``layer``: the name in messages.
    """

    head_dim: Optional[int]
    dropout_rate: float = 0.0
    prev_block_num: int = NO_LIMIT
    next_block_num: int = NO_LIMIT
    tiling_stgy_name: str = "sparse"
    dp: int = 1
    mp: int = 1
    have_attention_mask_batch: bool = True
    alibi: bool = False
    causal: bool = False
    local_window_size: object = None
    scale: Optional[float] = None
    block_size: Optional[int] = None
    engine: Optional[str] = None
    return_lse: bool = False
    layer: str = LAYER
    head_num: Optional[int] = None

    def __post_init__(self):
        for name in ("head_dim", "head_num"):
            if getattr(self, name) is not None:
                check_int(self.layer, name, getattr(self, name), 1)
        check_rate(self.layer, "dropout_rate", self.dropout_rate)
        for name in ("prev_block_num", "next_block_num"):
            check_int(self.layer, name, getattr(self, name), 0)
        strategy = get_strategy(self.tiling_stgy_name, self.layer)
        for name in ("dp", "mp"):
            check_int(self.layer, name, getattr(self, name), 1)
        for name in ("have_attention_mask_batch", "alibi", "causal", "return_lse"):
            check_bool(self.layer, name, getattr(self, name))
        check_window(self.layer, self.local_window_size)
        check_scale(self.layer, self.scale)
        if self.block_size is None:
            object.__setattr__(self, "block_size", strategy.block_size)
        check_int(self.layer, "block_size", self.block_size, 1)

    def options(self, training):
        """The functional call's :class:`Options`; dropout acts in training only."""
        return Options(
            scale=self.scale,
            is_causal=self.causal,
            local_window_size=self.local_window_size,
            prev_block_num=self.prev_block_num,
            next_block_num=self.next_block_num,
            block_size=self.block_size,
            dropout_rate=self.dropout_rate if training else 0.0,
            layout="BNSD",
            tiling=self.tiling_stgy_name,
        )

    def check_query(self, shape):
        """Raise unless the query is (B, N, S, head_dim), with N = head_num; either may be left open by None."""
        if len(shape) != 4:
            raise invalid_value(self.layer, "query", "of rank 4 with layout BNSD", "shape {}".format(tuple(shape)))
        if self.head_dim is not None and shape[3] != self.head_dim:
            raise invalid_value(self.layer, "query", "of head_dim {}".format(self.head_dim), shape[3])
        if self.head_num is not None and shape[1] != self.head_num:
            raise invalid_value(self.layer, "query", "of {} heads, as head_num says".format(self.head_num), shape[1])

    def mask_shape(self, mask, batch, heads, q_len, kv_len):
        """Shape to give ``attention_mask`` before it becomes the functional ``mask``.

        Args:
            mask: ``TensorInfo`` of attention_mask: (Sq,Sk), (1|B,Sq,Sk), (1|B,1|N,Sq,Sk), or compact (T,T), (1,T,T)
                with ``T = block_size``.

        Returns:
            the 4-D shape, or (T, T).
        """
        shape, size = tuple(mask.shape), self.block_size
        if "int" not in mask.dtype and mask.dtype != "bool" and mask.dtype not in FLOATS:
            raise invalid_type(
                self.layer, "attention_mask", "a bool, int or float tensor (non-zero = discard)", mask.dtype
            )
        batches, head_counts = {1, batch}, {1, heads}
        whole = {
            2: lambda: (1, 1),
            3: lambda: (shape[0], 1) if shape[0] in batches or batch == -1 else None,
            4: lambda: shape[:2] if (shape[0] in batches or batch == -1) and shape[1] in head_counts else None,
        }.get(len(shape), lambda: None)()
        if whole is not None and shape[-2:] == (q_len, kv_len):
            if whole[0] != 1 and not self.have_attention_mask_batch:
                raise invalid_value(
                    self.layer,
                    "attention_mask",
                    "of batch size 1 when have_attention_mask_batch=False",
                    "shape {}".format(shape),
                    "Use have_attention_mask_batch=True.",
                )
            return tuple(whole) + (q_len, kv_len)
        if shape in ((size, size), (1, size, size)):
            if q_len != kv_len:
                raise invalid_value(
                    self.layer,
                    "attention_mask",
                    "of shape ({}, {}) when the query and key lengths differ".format(q_len, kv_len),
                    "the compact shape {}".format(shape),
                    "Give the whole mask.",
                )
            return (size, size)
        raise invalid_value(
            self.layer,
            "attention_mask",
            "of shape ({q}, {k}), (1|{b}, {q}, {k}), (1|{b}, 1|{n}, {q}, {k}) or compact ({t}, {t})".format(
                q=q_len, k=kv_len, b=batch, n=heads, t=size
            ),
            "shape {}".format(shape),
        )

    def check_alibi_mask(self, alibi_mask, batch, heads, q_len, kv_len):
        """Raise unless ``alibi_mask`` (a ``TensorInfo``) is allowed and of shape (1|B, N, 1|Sq, Sk)."""
        if not self.alibi:
            raise invalid_value(
                self.layer, "alibi_mask", "None when alibi=False", "a tensor", "Construct the Cell with alibi=True."
            )
        if alibi_mask.dtype not in FLOATS:
            raise invalid_type(self.layer, "alibi_mask", "a float tensor", alibi_mask.dtype)
        shape = tuple(alibi_mask.shape)
        good = len(shape) == 4 and (shape[0] in (1, batch) or batch == -1)
        if not (good and shape[1] == heads and shape[2] in (1, q_len) and shape[3] == kv_len):
            raise invalid_value(
                self.layer,
                "alibi_mask",
                "of shape (1|{}, {}, 1|{}, {})".format(batch, heads, q_len, kv_len),
                "shape {}".format(shape),
            )
