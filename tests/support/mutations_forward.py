"""Deliberate mistakes in the Ascend forward kernel."""

from support.mutation import Mutation

from flash_attention.ascend.forward import _Forward
from flash_attention.ascend.query_tile import QueryTile
from flash_attention.ascend.tile_ops import finish, softmax

FORWARD = [
    Mutation(
        "maximum not initialised",
        QueryTile.start,
        'fill(api, self.lanes("running"), softmax.LOWEST, geometry.q_groups)',
        "pass",
    ),
    Mutation(
        "output not initialised",
        QueryTile.start,
        "fill(api, self.output(), 0.0, geometry.q_groups * self.kernel.rows // 4)",
        "pass",
    ),
    Mutation("output not rescaled", softmax.accumulate, "rows // 4, lane)", "rows // 4)"),
    Mutation(
        "maximum over half the keys",
        softmax.max_over_keys,
        "Lanes(source, LANES, 16)",
        "Lanes(source, 0, 16)",
        "extreme",
    ),
    Mutation(
        "partly overlapping operands",
        softmax.max_over_keys,
        "Lanes(scratch), Lanes(source, 0, 16)",
        "Lanes(source, 8), Lanes(source, 0, 16)",
    ),
    Mutation(
        "maximum taken before the update",
        softmax.update_maximum,
        "vec_max, addend, running, tile_max",
        "vec_max, addend, running, running",
    ),
    Mutation("scale dropped", softmax.update_maximum, "addend, addend, -scale", "addend, addend, -1.0"),
    Mutation("statistic of the other resident tile", QueryTile.lanes, "self.slot * self.kernel.statistic +", "0 +"),
    Mutation("scores of the other resident tile", QueryTile.products, "self.slot * slot + offset", "offset"),
    Mutation(
        "probabilities of the other resident tile",
        QueryTile.probs,
        "offset=self.slot * self.tiles.q * self.tiles.kv",
        "offset=0",
    ),
    Mutation(
        "row sums after dropout", QueryTile.attend, "ones, self.probs())", 'ones, self.probs("kept_l1"))', "dropout"
    ),
    Mutation(
        "keys of the wrong head of the group",
        _Forward._load_keys,
        "head // self.spec.group *",
        "head % self.spec.kv_heads *",
        "groups",
    ),
    Mutation("LSE without the maximum", finish.log_sum_exp, "vec_add, dst, dst, running", "vec_add, dst, dst, dst"),
    Mutation("LSE of the unscaled maximum", finish.log_sum_exp, "running, running, scale", "running, running, 1.0"),
    Mutation(
        "sums of dead rows divided by",
        finish.alive_and_divisor,
        "vec_sub, divisor, ones, alive",
        "vec_sub, divisor, ones, ones",
        "dead rows",
    ),
    Mutation(
        "atomic add left on",
        finish.store_statistic,
        "layout.gather_lanes(",
        "api.set_atomic_add(1)\n    layout.gather_lanes(",
    ),
    Mutation("no store of the last piece", QueryTile.store, "range(geometry.pieces)", "range(geometry.pieces - 1)"),
    Mutation(
        "output stored before it is transposed", QueryTile._store_piece, "target, out, size", "target, half, size"
    ),
    Mutation(
        "stale key tile",
        _Forward._task,
        "self._load_keys(key, value, head, key_tile)",
        "self._load_keys(key, value, head, first)",
    ),
]

SURVIVORS = {
    ("forward", "probabilities of the other resident tile"): "P of one tile is multiplied before that of the other is "
    "written, so sharing its place only costs overlap",
}
"""(kernel, name) of the mistakes that nothing shows, and why."""
