"""Deliberate mistakes in the Ascend backward kernel."""

from support.mutation import Mutation

from flash_attention.ascend import backward_arguments, backward_budget, backward_operands, preprocess_arguments
from flash_attention.ascend.backward import _Backward
from flash_attention.ascend.backward_pair import TilePair
from flash_attention.ascend.kernel import Kernel
from flash_attention.ascend.preprocess import _Preprocess
from flash_attention.ascend.tile_ops import gradient, layout, vector

BACKWARD = [
    Mutation(
        "stale key tile",
        _Backward._query_task,
        "head // self.spec.group, key_tile)",
        'head // self.spec.group, field["first"])',
    ),
    Mutation(
        "stale query tile",
        _Backward._key_task,
        "self._load_queries(query, d_out, head, q_tile)",
        "self._load_queries(query, d_out, head, first)",
    ),
    Mutation(
        "P of the other piece",
        TilePair.differentiate,
        "Place(kept), self.elements)",
        'Place(local["probs1"]), self.elements)',
    ),
    Mutation("sums of dK and dV not initialised", _Backward._key_task, "for number in (0, 1):", "for number in ():"),
    Mutation("sums of dK initialised, of dV not", _Backward._key_task, "for number in (0, 1):", "for number in (1,):"),
    Mutation(
        "zeros not initialised",
        Kernel._constants,
        'fill(api, Lanes(local["zeros"], 0, 1), 0.0,',
        'fill(api, Lanes(local["zeros"], 0, 1), 0.5,',
        "ragged",
    ),
    Mutation(
        "queries with the keys' row count",
        _Backward._load_queries,
        "Rows(geometry.depth, geometry.q_rows, rows",
        "Rows(geometry.depth, geometry.kv_rows, rows",
        "ragged",
    ),
    Mutation(
        "gradient stored with the keys' row count",
        _Backward._store_query_gradient,
        "Rows(FRACTAL, geometry.q_rows",
        "Rows(FRACTAL, geometry.kv_rows",
        "ragged",
    ),
    Mutation(
        "last query tile skipped", _Backward._key_task, "api.for_range(first, stop", "api.for_range(first, stop - 1"
    ),
    Mutation(
        "first key tile skipped",
        _Backward._query_task,
        'api.for_range(field["first"], ',
        'api.for_range(field["first"] + 1, ',
    ),
    Mutation(
        "wrong head of the group", _Backward._key_task, "kv_head * spec.group + member", "kv_head + member", "groups"
    ),
    Mutation("one head of the group only", _Backward._key_task, "for_range(0, spec.group", "for_range(0, 1", "groups"),
    Mutation(
        "keys of the wrong head of the group",
        _Backward._query_task,
        "head // self.spec.group",
        "head % self.spec.kv_heads",
        "groups",
    ),
    Mutation("scale of dQ and dK dropped", backward_arguments.result_factors, "spec.scale * gain", "gain"),
    Mutation("factor of dV for all", _Backward._store_tile, "_FACTOR[name]", '_FACTOR["d_value"]'),
    Mutation(
        "power of two of P kept in dV",
        backward_arguments.result_factors,
        "2.0 ** -probability_exponent(geometry) * gain",
        "gain",
    ),
    Mutation("cotangents not divided", backward_arguments.cotangent_exponent, "max(0,", "0 * max(0,", "large products"),
    Mutation("power of two of P kept in dS", TilePair.differentiate, "kept, 2.0**-self.kernel.exponent", "kept, 1.0"),
    Mutation(
        "share that dropout keeps forgotten",
        backward_arguments.result_factors,
        "power / (1.0 - spec.dropout_rate)",
        "power",
        "dropout",
    ),
    Mutation("delta of dropped keys forgotten", gradient.add_dropped, "range(groups)", "range(0)", "dropout"),
    Mutation(
        "delta of dropped keys of the first queries only",
        TilePair._load_minus_delta,
        "+ piece * self.rows",
        "",
        "dropout",
    ),
    Mutation(
        "scale of the exponents dropped",
        TilePair._exponents_in_fp16,
        "probs, probs, self.spec.scale",
        "probs, probs, 1.0",
        "ragged",
    ),
    Mutation(
        "LSE in one fp16 part",
        _Preprocess._split,
        "enumerate((COARSE, 1.0, 1.0))",
        "enumerate((COARSE,))",
        "large scores",
    ),  # fmt: skip
    Mutation("LSE not negated", preprocess_arguments.row_statistics, "np.log(2.0) - lse", "np.log(2.0) + lse"),
    Mutation(
        "delta without the LSE's cotangent",
        preprocess_arguments.row_statistics,
        "np.where(dead, 0.0, d_lse)",
        "np.zeros_like(d_lse)",
    ),
    Mutation("delta of the wrong sign", _Preprocess._piece, "sums, sums, -share", "sums, sums, share"),
    Mutation("delta of the first column group", _Preprocess._sum_products, "geometry.depth * self.rows,", "16,"),
    Mutation("products of O with O", _Preprocess._sum_products, "Lanes(d_out, first, 4)", "Lanes(out, first, 4)"),
    Mutation("products not initialised", _Preprocess._sum_products, "fill(api, products, 0.0, self.rows // 4)", "pass"),
    Mutation("delta of half a row", vector.sum_rows, "api.vcadd(16,", "api.vcadd(8,", kernels=("backward",)),
    Mutation("rows one block late", vector.sum_rows, "count, 1, 1, 2)", "count, 1, 1, 3)", kernels=("backward",)),
    Mutation("O of another head", _Preprocess._sum_products, "start = head * (", "start = 0 * (", "groups"),
    Mutation(
        "columns of the first piece only",
        _Preprocess._piece,
        "+ piece * self.rows\n        elements",
        "\n        elements",
        "square",
    ),  # fmt: skip
    Mutation(
        "columns not transposed", _Preprocess._piece, 'Place(local["rows"]), elements)', "Place(local[name]), elements)"
    ),  # fmt: skip
    Mutation(
        "delta not subtracted",
        TilePair.products,
        "self._rows_of(right, piece, columns,",
        'self._rows_of(right, piece, columns - (0 if name == "scores" else 16),',
    ),
    Mutation(
        "cotangent of a dead row's LSE",
        preprocess_arguments.row_statistics,
        "np.where(dead, 0.0, d_lse)",
        "d_lse",
        "dead rows",
    ),
    Mutation(
        "P and dS exchanged",
        TilePair.add_key_gradients,
        '("probs_l1", self.d_out), ("d_scores_l1", self.query)',
        '("d_scores_l1", self.d_out), ("probs_l1", self.query)',
    ),
    Mutation("dS not transposed", TilePair.add_query_gradient, "piece, transposed=True", "piece", "square"),
    Mutation("pieces share their products", TilePair.products, "[piece * self.elements]", "[0]"),
    Mutation("dK and dV overwritten by each tile", TilePair.add_key_gradients, "accumulate=True", "accumulate=False"),
    Mutation(
        "dS before delta's product",
        gradient.score_gradients,
        "Lanes(d_scores), Lanes(d_scores), Lanes(probs)",
        "Lanes(d_scores), Lanes(probs), Lanes(probs)",
    ),
    Mutation(
        "dS one block late",
        gradient.score_gradients,
        "Lanes(d_scores), Lanes(d_scores),",
        "Lanes(d_scores, 16), Lanes(d_scores),",
    ),
    Mutation(
        "exponential of half a piece", gradient.exponential, "elements // HALF_LANES", "elements // HALF_LANES // 2"
    ),
    Mutation(
        "fp16 accumulation of dK and dV", backward_budget._cube, '"sums", "L0C", "float32"', '"sums", "L0C", "float16"'
    ),
    Mutation(
        "atomic add left on", _Backward._store_tile, "lanes = Lanes(", "api.set_atomic_add(1)\n    lanes = Lanes("
    ),
    Mutation(
        "result buffer read before it is written",
        _Backward._store_tile,
        "Lanes(half, 0, 4), Lanes(wide)",
        'Lanes(half, 0, 4), Lanes(self.local["result1"])',
    ),
    Mutation("mask of one piece for all", layout.load_operand, "(piece * loaded * keys * lanes if", "(0 if", "mask"),
    Mutation(
        "mask of the first batch for all",
        layout.load_operand,
        "head // heads if batches > 1",
        "0 if batches > 1",
        "mask",
    ),
    Mutation("discarded keys kept", gradient.discard, "api.vec_min", "api.vec_max", "mask"),
    Mutation(
        "keys that do not exist kept",
        backward_arguments.pack_key_columns,
        "packed[spec.kv_len :, HIDING]",
        "packed[spec.kv_len :, 15]",
        "negative slopes",
    ),
    Mutation(
        "queries that do not exist alive",
        preprocess_arguments.row_statistics,
        "-DEAD / spec.scale",
        "0.0",
        "negative slopes",
    ),
    Mutation("slope of another head", Kernel.load_slopes, "head * 16", "0", "ALiBi"),
    Mutation("sign of later keys forgotten", gradient.signs, "vec_max, Lanes(dst)", "vec_min, Lanes(dst)", "ALiBi"),
    Mutation(
        "bias sums of one query tile",
        backward_operands.BiasSums.cube,
        "accumulate=True",
        "accumulate=False",
        "key bias",
    ),
    Mutation(
        "row of the fractal next to the sums",
        backward_operands.store_row,
        "src.at(row * FRACTAL)",
        "src.at(row * FRACTAL + FRACTAL)",
        "key bias",
    ),
    Mutation(
        "unvisited bias tiles not written",
        backward_operands.BiasTiles.start,
        '(0, field["first"]), (field["stop"], self.geometry.kv_tiles)',
        '(0, field["first"]),',
        "bias",
    ),
]
