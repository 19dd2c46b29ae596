"""The FlashAttention-2 forward kernel in TIK (Dao, 2023, algorithm 1), for Ascend 910A and 310P.

One task is `resident` query tiles of one head. For every key tile that any of them visits: scores S^T = K Q^T (cube),
softmax (vector), O^T += [V 1]^T P^T (cube), rescaled in fp32 (vector). The phases run tile by tile, so the cube works
for one resident tile while the vector unit works for the other. Nothing but m, l and O is carried from one key tile to
the next, and they are initialised when the task starts, whichever key tile is visited first.

The phases of one query tile are in :mod:`query_tile`.
"""

from flash_attention.ascend.budget import forward_buffers
from flash_attention.ascend.program import Program
from flash_attention.ascend.query_tile import QueryTile
from flash_attention.ascend.signature import forward_signature
from flash_attention.ascend.tasks import CORE_FIELDS
from flash_attention.ascend.tile_ops import layout, masks
from flash_attention.ascend.tile_ops.layout import Rows
from flash_attention.ascend.tile_ops.matmul import Cube
from flash_attention.ascend.tile_ops.vector import LANES, Lanes, Place, fill


def build_forward(tik, geometry, cores, kernel_name="flash_attention_forward", with_lse=True, disable_debug=False):
    """Build the kernel; the returned TIK instance runs it by ``tikdb.start_debug``.

    Args:
        tik: module with the interface of ``tbe.tik``.
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`; its spec must be one that ``supports`` takes.
        cores: AI cores to run on.
        kernel_name: of the compiled function.
        with_lse: write the log-sum-exp, for training; inference leaves it out.
        disable_debug: for builds that only run on a device.
    """
    return _Forward(Program(tik, disable_debug), geometry, with_lse).build(cores, kernel_name)


class _Forward:
    """The kernel while it is written; ``gm`` and ``local`` hold the declared tensors by name."""

    def __init__(self, program, geometry, with_lse):
        self.program, self.api = program, program.api
        self.tik_all = program.tik.all
        self.geometry, self.spec, self.tiles = geometry, geometry.spec, geometry.tiles
        self.with_lse = with_lse
        self.rows = geometry.depth + 16  # of O^T with its row sums
        self.statistic = geometry.q_groups * LANES
        self.buffers = {buffer.name: buffer for buffer in forward_buffers(geometry)}
        self.gm, self.local = {}, {}
        self.cube = None

    # --- program ----------------------------------------------------------------------------------
    def build(self, cores, kernel_name):
        """Write the whole kernel and compile it."""
        inputs, outputs = forward_signature(self.geometry, cores, self.with_lse)
        self.gm = {argument.name: self.program.gm(argument) for argument in inputs + outputs}
        with self.api.for_range(0, cores, name="core", block_num=cores) as core:
            self._declare()
            self._constants()
            layout.copy(self.api, Place(self.local["core"]), Place(self.gm["cores"], core * CORE_FIELDS), CORE_FIELDS)
            start = self.program.integer(self.local["core"][0], "start")
            stop = self.program.integer(self.local["core"][1], "stop")
            with self.api.for_range(start, stop, name="item") as item:
                self._task(item // self.geometry.q_tasks, item % self.geometry.q_tasks)
        self.api.BuildCCE(
            kernel_name=kernel_name,
            inputs=[self.gm[argument.name] for argument in inputs],
            outputs=[self.gm[argument.name] for argument in outputs],
        )
        return self.api

    def _declare(self):
        """All local buffers, inside the cores' loop; the key loop declares its own, twice, for double buffering."""
        self.cube = Cube(self.program)
        for name, buffer in self.buffers.items():
            if buffer.copies == 1 and buffer.scope not in ("L0A", "L0B"):
                self.local[name] = self.program.local(buffer)

    def _constants(self):
        """What stays the same for all tasks of a core."""
        api, local = self.api, self.local
        fill(api, Lanes(local["half0"]), 1.0, 2, mask=128)
        layout.copy(api, Place(local["ones_l1"]), Place(local["half0"]), 256)
        fill(api, Lanes(local["scale"]), self.spec.scale, 1)
        if "zeros" in local:
            fill(api, Lanes(local["zeros"], 0, 1), 0.0, self.buffers["zeros"].elements // 16, mask=16)
        if "index" in local:
            masks.index_tile(api, local["index"], self.tiles.kv, masks.UNIT)
        if "key_index" in local:
            masks.index_tile(api, local["key_index"], self.tiles.kv)

    # --- one task ---------------------------------------------------------------------------------
    def _task(self, head, number):
        api = self.api
        width = self.buffers["task"].elements
        layout.copy(api, Place(self.local["task"]), Place(self.gm["tasks"], number * width), width)
        first = self.program.integer(self.local["task"][0], "first")
        stop = self.program.integer(self.local["task"][1], "stop")
        tiles = [QueryTile(self, head, number, slot) for slot in range(self.tiles.resident)]
        if self.spec.alibi_shape is not None:
            self._slopes(head)
        for tile in tiles:
            with tile.exists():
                tile.start()
        with api.for_range(first, stop, name="key_tile", thread_num=2) as key_tile:
            key, value = self.program.local(self.buffers["key_l1"]), self.program.local(self.buffers["value_l1"])
            self._load_keys(key, value, head, key_tile)
            for tile in tiles:
                with tile.visits(key_tile):
                    tile.scores(key)
            for tile in tiles:
                with tile.visits(key_tile):
                    tile.attend(key_tile, value)
            for tile in tiles:
                with tile.visits(key_tile):
                    tile.accumulate()
        for tile in tiles:
            with tile.exists():
                tile.store()

    def _slopes(self, head):
        """The head's slope, and its products with the key index, of both signs."""
        layout.copy(self.api, Place(self.local["slope"]), Place(self.gm["slopes"], head * 16), 16)
        for sign in (0, 1):
            tile = Place(self.local["slope_tiles"], sign * self.tiles.kv * 16)
            slope = Lanes(self.local["slope"], sign * 8, 0)
            masks.slope_tile(self.api, tile, self.local["key_index"], slope, self.tiles.kv)

    def _load_keys(self, key, value, head, key_tile):
        """One tile of K and of V to L1; query heads of a group read the same ones."""
        geometry, api = self.geometry, self.api
        start = head // self.spec.group * (geometry.depth * geometry.kv_rows) + key_tile * (self.tiles.kv * 16)

        def load(rows):
            size = Rows(geometry.depth, geometry.kv_rows, self.tiles.kv, rows)
            for dst, name in ((key, "key"), (value, "value")):
                layout.load_rows(api, Place(dst), Place(self.gm[name], start), size)
                if rows < self.tiles.kv:  # what was there before could be NaN, and 0 * NaN is not 0
                    layout.clear_rows(api, Place(dst), self.local["zeros"], size)

        self.program.with_tail(key_tile, geometry.kv_tiles, self.tiles.kv, geometry.kv_tail, load)
