"""numpy on the host: a call's tensors to kernel arguments and back, and a built kernel run by ``tikdb.start_debug``.

The functions that start with ``pack_`` define the contents of the arguments that :mod:`signature` names.
"""

import numpy as np

from flash_attention.ascend import tasks
from flash_attention.ascend.geometry import FRACTAL, round_up
from flash_attention.ascend.signature import forward_signature, mask_axes, needs_bounds, tile_axes
from flash_attention.ascend.tile_ops.masks import DISCARD, UNIT
from flash_attention.core import dropout

TASK_COST = 2.0
"""Loading and storing a query tile, in visited tile pairs, when tasks are shared out over the cores."""


def to_nz(x, dtype=np.float16):
    """(..., S, D) -> FRACTAL_NZ (..., D/16, S/16, 16, 16), both sizes padded with zeros to multiples of 16."""
    rows, columns = x.shape[-2:]
    padded = np.zeros(x.shape[:-2] + (round_up(rows), round_up(columns)), dtype)
    padded[..., :rows, :columns] = x
    split = padded.reshape(x.shape[:-2] + (padded.shape[-2] // FRACTAL, FRACTAL, padded.shape[-1] // FRACTAL, FRACTAL))
    return np.ascontiguousarray(np.moveaxis(split, -2, -4))


def from_nz(x, rows, columns):
    """FRACTAL_NZ (..., D/16, S/16, 16, 16) -> (..., rows, columns), without the padding."""
    merged = np.moveaxis(x, -4, -2)
    whole = merged.reshape(x.shape[:-4] + (x.shape[-3] * FRACTAL, x.shape[-4] * FRACTAL))
    return np.ascontiguousarray(whole[..., :rows, :columns])


def pack_tiles(x, axes, dtype):
    """(1|B, 1|N, 1|Sq, 1|Sk) -> transposed tiles of ``axes``, (.., query tiles, key tiles, q1, keys, 16).

    What lies beyond Sq or Sk is zero. A single key is repeated for all; so is a single query when ``axes`` has only
    one group.
    """
    q_tiles, kv_tiles, groups, keys = axes[2:6]
    rows, columns = q_tiles * groups * FRACTAL, kv_tiles * keys
    padded = np.zeros(axes[:2] + (rows, columns), dtype)
    padded[:, :, : rows if x.shape[2] == 1 else x.shape[2], : columns if x.shape[3] == 1 else x.shape[3]] = x
    split = padded.reshape(axes[:2] + (q_tiles, groups, FRACTAL, kv_tiles, keys))
    return np.ascontiguousarray(split.transpose(0, 1, 2, 5, 3, 6, 4))


def pack_mask(geometry, keep):
    """A keep mask (1|B, 1|N, 1|Sq, 1|Sk) or compact (T, T) -> tiles of 0 and DISCARD, fp16."""
    if geometry.spec.compact_mask:
        return _pack_compact_mask(geometry, np.asarray(keep) > 0)
    discard = np.where(np.asarray(keep) > 0, 0.0, DISCARD)
    return pack_tiles(discard, mask_axes(geometry), np.float16)


def _pack_compact_mask(geometry, keep):
    """Only the tiles around the queries' own blocks; what they hold repeats, see ``tasks.strip_shape``."""
    discard = np.append(np.where(keep, 0.0, DISCARD), 0.0).astype(np.float16)
    return discard[compact_places(geometry)]


def compact_places(geometry):
    """For each element of a packed compact mask its place in the flat (T, T) mask, T * T where that does not apply."""
    axes = mask_axes(geometry)
    plan, size = geometry.plan(), geometry.spec.block_size
    packed = np.zeros(axes, np.int32)
    strip_first = tasks.query_tiles(plan)[:, tasks.TILE_FIELDS.index("strip_first")]
    for row in range(axes[2]):
        p = np.arange(plan.q_tile)[:, None] + row * plan.q_tile + plan.offset
        j = np.arange(axes[3] * plan.kv_tile)[None, :] + int(strip_first[row]) * plan.kv_tile
        places = np.where(p // size == j // size, p % size * size + j % size, size * size)
        packed[:, :, row] = pack_tiles(places[None, None], (1, 1, 1) + axes[3:], np.int32)[:, :, 0]
    return packed


def pack_bias(geometry, bias):
    """(1|B, 1|N, 1|Sq, 1|Sk) -> fp32 tiles."""
    return pack_tiles(np.asarray(bias, np.float32), tile_axes(geometry, geometry.spec.bias_shape), np.float32)


def pack_slopes(geometry, slopes):
    """(N,) or (B, N) -> fp32 (B, N, 2, 8): eight times the slope, eight times its negative."""
    each = np.broadcast_to(np.asarray(slopes, np.float32), geometry.batch_heads)[..., None, None]
    return np.repeat(np.concatenate([each, -each], axis=2), 8, axis=3)


def pack_keep(geometry, seed):
    """What dropout keeps, by ``core.dropout.keep``: uint8 tiles, one byte an element of (B, N, Sq, Sk), padded."""
    spec = geometry.spec
    axes = tile_axes(geometry, (spec.batch, spec.heads, spec.q_len, spec.kv_len))
    packed = np.zeros(axes, np.uint8)
    first_row, first_head, first_query, first_key = spec.origin
    i = first_query + np.arange(spec.q_len)[:, None]
    j = first_key + np.arange(spec.kv_len)[None, :]
    for batch in range(spec.batch):
        for head in range(spec.heads):
            kept = dropout.keep(np, seed, first_row + batch, first_head + head, i, j, spec.dropout_rate)
            packed[batch, head] = pack_tiles(kept[None, None], (1, 1) + axes[2:], np.uint8)[0, 0]
    return packed


def pack_bounds(geometry):
    """fp32 (3, queries padded to whole tiles): first and last visible key, as ``masks`` compares them, and position.

    Half a key is taken from the first and added to the last, so that no difference is 0; both are times UNIT.
    """
    plan = geometry.plan()
    first, last = tasks.visible_keys(plan)
    packed = np.stack([(first - 0.5) * UNIT, (last + 0.5) * UNIT, np.arange(plan.band.q_len) + plan.offset])
    return np.pad(packed, ((0, 0), (0, plan.q_tiles * plan.q_tile - plan.band.q_len)), "edge").astype(np.float32)


def task_loads(plan, resident):
    """Work of each task of a head: visited tile pairs and a constant a query tile."""
    pairs = (plan.kv_range[:, 1] - plan.kv_range[:, 0]) + TASK_COST
    return np.pad(pairs, (0, -len(pairs) % resident), "constant").reshape(-1, resident).sum(axis=1)


def forward_constants(geometry, cores):
    """The forward kernel's inputs that depend on no tensor, by name: bounds where needed, and the tables."""
    plan, resident = geometry.plan(), geometry.tiles.resident
    constants = {"bounds": pack_bounds(geometry)} if needs_bounds(geometry) else {}
    constants["tasks"] = tasks.query_tasks(plan, resident)
    constants["cores"] = tasks.split(task_loads(plan, resident), geometry.heads, cores)
    return constants


def pack_forward(geometry, cores, query, key, value, operands):
    """The kernel's inputs by name, in the order of :func:`~flash_attention.ascend.signature.forward_signature`.

    Args:
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`.
        cores: number of cores the kernel was built for.
        query, key, value: float16 (B, N, Sq, D), (B, Nkv, Sk, D), (B, Nkv, Sk, D).
        operands: :class:`~flash_attention.core.spec.Operands` of numpy arrays.
    """
    spec = geometry.spec
    feed = {"query": to_nz(query), "key": to_nz(key), "value": to_nz(value)}
    if spec.mask_shape is not None:
        feed["mask"] = pack_mask(geometry, operands.mask)
    if spec.bias_shape is not None:
        feed["bias"] = pack_bias(geometry, operands.bias)
    if spec.alibi_shape is not None:
        feed["slopes"] = pack_slopes(geometry, operands.slopes)
    if spec.dropout_rate:
        feed["keep"] = pack_keep(geometry, operands.dropout_seed)
    feed.update(forward_constants(geometry, cores))
    check_feed(feed, forward_signature(geometry, cores, True)[0])
    return feed


def check_feed(feed, arguments):
    """The tensors are those of the signature: names, order, shapes and dtypes."""
    given = [(name, str(array.dtype), array.shape) for name, array in feed.items()]
    wanted = [(argument.name, argument.dtype, argument.shape) for argument in arguments]
    if given != wanted:
        raise RuntimeError("packed tensors {} are not the kernel's arguments {}".format(given, wanted))


def unpack_forward(geometry, outputs):
    """Kernel outputs -> (out (B, N, Sq, D) float16, lse (B, N, Sq) float32 or None when it was not written)."""
    spec = geometry.spec
    out = from_nz(outputs[0], spec.q_len, spec.head_dim)
    if len(outputs) == 1:
        return out, None
    lse = outputs[1][..., : spec.q_len]
    return out, np.ascontiguousarray(lse)


def run(kernel, feed):
    """Run a built kernel; returns its outputs as a list of arrays.

    Args:
        kernel: TIK instance, built with its debugger. feed: arrays by argument name.
    """
    return kernel.tikdb.start_debug(feed_dict=feed, interactive=False)
