"""Deliberate mistakes in what both Ascend kernels are built from."""

from support.mutation import Mutation

from flash_attention.ascend import budget, host, program, tasks
from flash_attention.ascend.tile_ops import layout, masks, matmul, vector

_PLAIN = """self._load_right(l0b, right, first, count)
        self._api.mmad("""
_NO_SYNC = """with self._api.new_stmt_scope(disable_sync=True):
            self._load_right(l0b, right, first, count)
            self._api.mmad("""

SHARED = [
    Mutation(
        "burst gap off by one block", layout._strided, "src_rows - rows, dst", "src_rows - rows + 1, dst", "ragged"
    ),
    Mutation(
        "burst one block short",
        layout.copy,
        "elements // BLOCK[src.tensor.dtype]",
        "elements // BLOCK[src.tensor.dtype] - 1",
    ),
    Mutation(
        "store gap is the load's",
        layout.store_rows,
        "size.total, src, size.tile",
        "size.tile, src, size.tile",
        "ragged",
        ("forward",),
    ),
    Mutation("unaligned start", layout.spread_lanes, "number * 16", "number * 12"),
    Mutation("missing rows not cleared", layout.clear_rows, "size.columns // 16", "0", "ragged"),
    Mutation(
        "all but the first column group cleared",
        layout.clear_rows,
        "range(size.columns // 16)",
        "range(1, size.columns // 16)",
        "ragged",
    ),
    Mutation("one fractal of L0C not drained", layout.drain, '"m", bursts, fractals,', '"m", bursts, fractals - 1,'),
    Mutation(
        "more than 255 repeats",
        vector._calls,
        "min(REPEAT_LIMIT, repeats - first)",
        "repeats - first",
        "large tile",
        ("forward",),
    ),
    Mutation(
        "tail handled as a whole tile",
        program.Program.with_tail,
        "tiles - 1):\n        action(tail)",
        "tiles - 1):\n        action(rows)",
        "ragged",
    ),
    Mutation("tail of the first tile", program.Program.with_tail, "tile == tiles - 1", "tile == 0", "ragged"),
    Mutation("no barrier before mmad", matmul.Cube.multiply, _PLAIN, _NO_SYNC),
    Mutation(
        "mmad never accumulates over k",
        matmul.Cube.multiply,
        "int(accumulate or first > 0)",
        "int(accumulate)",
        "head size 256",
    ),
    Mutation(
        "L0 halves filled beyond their end",
        matmul.Cube.multiply,
        "HALF_BYTES // (2",
        "2 * HALF_BYTES // (2",
        "head size 256",
    ),
    Mutation(
        "left factor with the right one's stride",
        matmul.Cube._load_left,
        "first * r1 + m, count, r1)",
        "first * r1 + m, count, c1)",
        "head size 256",
    ),
    Mutation(
        "right factor not transposed",
        matmul.Cube._load_right,
        "first + k, c1, r1, transpose=True)",
        "first + k, c1, r1)",
    ),
    Mutation(
        "two cores share an item",
        tasks.split,
        "bounds[:-1], bounds[1:]",
        "bounds[:-1], np.minimum(bounds[1:] + 1, bounds[-1])",
    ),
    Mutation(
        "an item of no core",
        tasks.split,
        "bounds[:-1], bounds[1:]",
        "np.minimum(bounds[:-1] + 1, bounds[1:]), bounds[1:]",
    ),
    Mutation("first key tile skipped", tasks.query_tiles, "plan.kv_range[:, 0],", "plan.kv_range[:, 0] + 1,"),
    Mutation("bound one key late", host.pack_bounds, "(last + 0.5)", "(last + 1.5)"),
    Mutation("bound one key early", host.pack_bounds, "(first - 0.5)", "(first + 0.5)", "window"),
    Mutation(
        "tile with a bound taken for one without",
        tasks.query_tiles,
        "(last_key[first_query] + 1) // plan.kv_tile",
        "(last_key[last_query] + 1) // plan.kv_tile",
    ),
    Mutation(
        "lower bound hides what it should keep",
        masks.hide_before,
        "Lanes(scratch), Lanes(index), lane",
        "Lanes(scratch), lane, Lanes(index)",
        "window",
    ),
    Mutation("key index not made beyond the first rows", masks.index_tile, "while done < total:", "while False:"),
    Mutation(
        "one operand piece for all",
        layout.load_operand,
        "(piece * loaded * keys * lanes if",
        "(0 if",
        "mask",
        ("forward",),
    ),
    Mutation("buffers assumed to fit", budget.Budget.fits, "all(", "True or all(", "chosen tiles"),
]
