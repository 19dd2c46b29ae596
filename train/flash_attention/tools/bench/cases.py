"""What is measured: :class:`Case` (one attention call by numbers) and its inputs. numpy only."""

from dataclasses import asdict, dataclass, replace
from typing import Optional, Tuple

import numpy as np

from flash_attention.core.alibi import alibi_slopes
from flash_attention.core.mechanisms.dilated import make_patterns
from flash_attention.core.ranges import visible
from flash_attention.core.spec import NO_LIMIT, AttentionSpec

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
SEED = 20


@dataclass(frozen=True)
class Case:
    """One attention call, self-attention unless ``kv_len`` says otherwise.

    Attributes:
        batch, heads, q_len, head_dim: sizes of the query.
        kv_heads, kv_len: None = as the query's.
        window: (left, right) tokens; blocks: (prev, next) blocks of 128.
        segments: number of equal segments, 0 = none.
        compact: the compact (128, 128) lower-triangular keep mask.
        alibi, soft_cap, dropout: as in the functional call.
    """

    batch: int
    heads: int
    q_len: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    kv_heads: Optional[int] = None
    kv_len: Optional[int] = None
    window: Optional[Tuple[int, int]] = None
    blocks: Optional[Tuple[int, int]] = None
    alibi: bool = False
    soft_cap: Optional[float] = None
    segments: int = 0
    dropout: float = 0.0
    compact: bool = False

    @classmethod
    def from_json(cls, fields):
        """The case that ``asdict`` turned into JSON."""
        return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})

    def to_json(self):
        """Plain fields."""
        return asdict(self)

    def label(self):
        """Short text: sizes, then whatever differs from a plain call."""
        sizes = "({},{},{},{})".format(self.batch, self.heads, self.q_len, self.head_dim)
        words = [SHORT[self.dtype]]
        words += ["kv {}x{}".format(self.spec().kv_heads, self.spec().kv_len)] if self.kv_heads or self.kv_len else []
        words += [name for name in ("causal", "alibi", "compact") if getattr(self, name)]
        words += ["{} {}".format(name, x) for name, x in asdict(self).items() if x and name in _VALUED]
        return " ".join([sizes] + words)

    def spec(self):
        """The :class:`AttentionSpec` of this call."""
        kv_heads = self.kv_heads or self.heads
        prev, following = self.blocks or (NO_LIMIT, NO_LIMIT)
        return AttentionSpec(
            batch=self.batch,
            heads=self.heads,
            kv_heads=kv_heads,
            q_len=self.q_len,
            kv_len=self.kv_len or self.q_len,
            head_dim=self.head_dim,
            dtype=self.dtype,
            causal=self.causal,
            prev_block_num=prev,
            next_block_num=following,
            local_window_size=self.window,
            mask_shape=(128, 128) if self.compact else None,
            compact_mask=self.compact,
            alibi_shape=(self.heads,) if self.alibi else None,
            segments=bool(self.segments),
            soft_cap=self.soft_cap,
            dropout_rate=self.dropout,
        )

    def options(self):
        """Keywords of the functional call that are plain values, the same in both frameworks."""
        prev, following = self.blocks or (NO_LIMIT, NO_LIMIT)
        return {
            "is_causal": self.causal,
            "local_window_size": self.window,
            "prev_block_num": prev,
            "next_block_num": following,
            "logits_soft_cap": self.soft_cap,
            "dropout_rate": self.dropout,
        }

    def operands(self):
        """Keywords of the functional call that are tensors, as numpy arrays."""
        found = {}
        if self.alibi:
            found["alibi_slopes"] = alibi_slopes(self.heads)
        if self.segments:
            ids = np.arange(self.q_len, dtype=np.int32) * self.segments // self.q_len
            found["q_segment_ids"] = found["kv_segment_ids"] = np.broadcast_to(ids, (self.batch, self.q_len)).copy()
        if self.compact:
            found["mask"] = np.tri(128, dtype=bool)
        return found

    def plain(self):
        """True where only sizes, dtype, causality and windows are set: what every other library can be asked for."""
        return not (self.alibi or self.soft_cap or self.segments or self.dropout or self.compact)

    def dense_mask(self):
        """Boolean (Sq, Sk) of the band: what a library without windows must be given."""
        spec = self.spec()
        return visible(spec.band, np.arange(spec.q_len)[:, None] + spec.offset, np.arange(spec.kv_len)[None, :])

    def arrays(self):
        """``query, key, value, d_out`` as float32 numpy in BNSD, exactly representable in the case's dtype."""
        spec, rng = self.spec(), np.random.default_rng(SEED)
        q_shape = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
        kv_shape = (spec.batch, spec.kv_heads, spec.kv_len, spec.head_dim)
        names = (("query", q_shape), ("key", kv_shape), ("value", kv_shape), ("d_out", q_shape))
        return {name: round_to(rng.standard_normal(shape, dtype=np.float32), self.dtype) for name, shape in names}

    def sizes(self):
        """The plain call of the same sizes and dtype: what :meth:`arrays` depends on."""
        fields = ("batch", "heads", "q_len", "head_dim", "dtype", "kv_heads", "kv_len")
        return Case(**{name: getattr(self, name) for name in fields})

    def input_bytes(self):
        """Bytes of query, key and value."""
        spec = self.spec()
        elements = spec.heads * spec.q_len + 2 * spec.kv_heads * spec.kv_len
        return spec.batch * elements * spec.head_dim * BYTES[self.dtype]

    def forward_flops(self):
        """Multiply-adds times two of the two products, visible pairs of the band only."""
        spec = self.spec()
        p = np.arange(spec.q_len, dtype=np.int64) + spec.offset
        pairs = np.maximum(spec.band.last_key(p) - spec.band.first_key(p) + 1, 0).sum()
        return 4.0 * spec.batch * spec.heads * spec.head_dim * float(np.broadcast_to(pairs, ()))

    def shrunk(self, length=256):
        """A small version of the same call, for --quick, warm-ups and tests."""
        kv_len = None if self.kv_len is None else min(self.kv_len, length)
        return replace(self, batch=1, q_len=min(self.q_len, length), kv_len=kv_len)


_VALUED = ("window", "blocks", "soft_cap", "segments", "dropout")


def geometric_patterns(length, first=2048):
    """Dilated attention's ``(segment sizes, rates)``: both double as long as a segment fits into the length."""
    rates = tuple(2**p for p in range(max(1, (length // first).bit_length())))
    return tuple(first * rate for rate in rates), rates


BUCKETS = {"hash4": 4, "hash16": 16}
KEPT = {"qk50": 0.5, "qk25": 0.25}
"""Candidates of dynamic sparse attention: the number of balanced buckets, or the share of the tokens kept."""


def sparse_indices(case, candidate):
    """``(mode, q_idx, k_idx)`` of such a candidate, drawn at random: (B, S, N) bucket ids or flags."""
    rng, shape = np.random.default_rng(SEED), (2, case.batch, case.q_len, case.heads)
    if candidate in BUCKETS:
        return ("hash",) + tuple(rng.integers(0, BUCKETS[candidate], shape).astype(np.int32))
    return ("qk",) + tuple(rng.random(shape) < KEPT[candidate])


LANDMARK_BLOCK = 64
"""Landmark attention's regular pattern: the last of so many keys is a landmark."""


def pair_counts(case, candidate, start, rows):
    """How often the last head's queries ``start ..`` see each key under a mechanism, (1, 1, rows, S); None = once.

    A mechanism that sees a key several times weighs it as often (dilated attention's mixture of patterns).
    """
    i, j = np.arange(start, start + rows)[:, None], np.arange(case.q_len)[None, :]
    if candidate in BUCKETS or candidate in KEPT:
        mode, q_idx, k_idx = sparse_indices(case, candidate)
        q_idx, k_idx = q_idx[-1, start : start + rows, -1, None], k_idx[-1, None, :, -1]
        counts = (q_idx == k_idx) if mode == "hash" else (q_idx & k_idx)
    elif candidate == "dilated":
        counts, head = np.zeros((rows, case.q_len), np.int64), case.heads - 1
        for pattern in make_patterns(case.q_len, case.heads, *geometric_patterns(case.q_len)):
            kept = pattern.kept()[head]
            counts += kept[i] & kept[j] & (i // pattern.segment == j // pattern.segment)
    else:
        return None
    return np.where(i >= j, counts, 0)[None, None]


LAYERS = ("colt5", "dense layer")
"""Candidates with parameters."""


def same_pairs(candidate):
    """Whether a candidate computes the pairs of the plain call, which :meth:`Case.forward_flops` counts.

    One of a module of its own ('MODULE:NAME') has other work.
    """
    name = candidate.partition("/")[0]
    return ":" not in name and name not in LAYERS and name not in BUCKETS and name not in KEPT and name != "dilated"


def routed_layer(case):
    """``(width, keywords)`` of CoLT5's attention in a layer of the case's heads: a quarter of them light.

    One query of 16 and one key of 8 are routed, as in the paper.
    """
    light = max(1, case.heads // 4)
    sizes = {"light_heads": light, "heavy_heads": case.heads - light}
    sizes.update(light_dim_head=case.head_dim, heavy_dim_head=case.head_dim)
    return case.heads * case.head_dim, dict(
        sizes, num_heavy_tokens_q=max(1, case.q_len // 16), num_heavy_tokens_kv=max(1, case.q_len // 8)
    )


def round_to(x, dtype):
    """float32 values rounded to ``dtype`` (nearest even), still stored as float32."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x
