"""The FlashAttention-2 forward kernel in TIK (Dao, 2023, algorithm 1), for Ascend 910A and 310P.

One task is `resident` query tiles of one head. For every key tile that any of them visits: scores S^T = K Q^T (cube),
softmax (vector), O^T += [V 1]^T P^T (cube), rescaled in fp32 (vector). The phases run tile by tile, so the cube works
for one resident tile while the vector unit works for the other. Nothing but m, l and O is carried from one key tile to
the next, and they are initialised when the task starts, whichever key tile is visited first.

The phases of one query tile are in :mod:`query_tile`.
"""

from flash_attention.ascend.budget import forward_buffers
from flash_attention.ascend.kernel import Kernel
from flash_attention.ascend.program import Program
from flash_attention.ascend.query_tile import QueryTile
from flash_attention.ascend.signature import forward_signature
from flash_attention.ascend.tile_ops import layout
from flash_attention.ascend.tile_ops.layout import Rows
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
    kernel = _Forward(Program(tik, disable_debug), geometry, with_lse)
    return kernel.build(forward_signature(geometry, cores, with_lse), cores, kernel_name)


class _Forward(Kernel):
    """The kernel while it is written."""

    def __init__(self, program, geometry, with_lse):
        bounded = geometry.bounded_below, geometry.bounded_above
        super().__init__(program, geometry, forward_buffers(geometry), bounded)
        self.with_lse = with_lse
        self.rows = geometry.depth + 16  # of O^T with its row sums
        self.statistic = geometry.q_groups * LANES

    def _constants(self):
        super()._constants()
        fill(self.api, Lanes(self.local["half0"]), 1.0, 2, mask=128)
        layout.copy(self.api, Place(self.local["ones_l1"]), Place(self.local["half0"]), 256)

    def _work(self, start, stop):
        with self.api.for_range(start, stop, name="item") as item:
            self._task(item // self.geometry.q_tasks, item % self.geometry.q_tasks)

    # --- one task ---------------------------------------------------------------------------------
    def _task(self, head, number):
        api = self.api
        width = self.buffers["task"].elements
        layout.copy(api, Place(self.local["task"]), Place(self.gm["tasks"], number * width), width)
        first = self.program.integer(self.local["task"][0], "first")
        stop = self.program.integer(self.local["task"][1], "stop")
        tiles = [QueryTile(self, head, number, slot) for slot in range(self.tiles.resident)]
        self.load_slopes(head)
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
