"""What the kernels have in common: the frame of the program, and buffers and constants by name.

A kernel is one loop over cores. Each core declares its buffers, makes its constants, reads its row of 'cores' and works
through the items that it is given.
"""

from flash_attention.ascend.tasks import CORE_FIELDS
from flash_attention.ascend.tile_ops import layout, masks
from flash_attention.ascend.tile_ops.layout import Place
from flash_attention.ascend.tile_ops.matmul import Cube
from flash_attention.ascend.tile_ops.vector import Lanes, fill


class Kernel:
    """A kernel while it is written; ``gm`` and ``local`` hold the declared tensors by name.

    Args:
        program: :class:`~flash_attention.ascend.program.Program`.
        geometry: :class:`~flash_attention.ascend.geometry.Geometry`.
        buffers: every local :class:`~flash_attention.ascend.program.Buffer`.
        bounded: (below, above): the sides on which some tile needs a bound of visible keys.
    """

    SHARES = 1
    """Outer loops: pairs [start, stop) in a core's row of 'cores'."""

    def __init__(self, program, geometry, buffers, bounded):
        self.program, self.api, self.tik = program, program.api, program.tik
        self.geometry, self.spec, self.tiles = geometry, geometry.spec, geometry.tiles
        self.buffers = {buffer.name: buffer for buffer in buffers}
        self.bounded = bounded
        self.gm, self.local = {}, {}
        self.cube = None

    def build(self, signature, cores, kernel_name):
        """Write the whole kernel and compile it; returns the TIK instance.

        Args:
            signature: (inputs, outputs), lists of :class:`~flash_attention.ascend.program.GmTensor`.
            cores: AI cores to run on. kernel_name: of the compiled function.
        """
        inputs, outputs = signature
        self.gm = {argument.name: self.program.gm(argument) for argument in inputs + outputs}
        with self.api.for_range(0, cores, name="core", block_num=cores) as core:
            self._declare()
            self._constants()
            layout.copy(self.api, Place(self.local["core"]), Place(self.gm["cores"], core * CORE_FIELDS), CORE_FIELDS)
            bounds = [self.program.integer(self.local["core"][n], "bound") for n in range(2 * self.SHARES)]
            self._work(*bounds)
        self.api.BuildCCE(
            kernel_name=kernel_name,
            inputs=[self.gm[argument.name] for argument in inputs],
            outputs=[self.gm[argument.name] for argument in outputs],
        )
        return self.api

    def _declare(self):
        """All local buffers, inside the cores' loop; the inner loops declare theirs, twice, for double buffering."""
        if "l0a_0" in self.buffers:
            self.cube = Cube(self.program)
        for name, buffer in self.buffers.items():
            if buffer.copies == 1 and buffer.scope not in ("L0A", "L0B"):
                self.local[name] = self.program.local(buffer)

    def _constants(self):
        """What stays the same for all tasks of a core."""
        api, local = self.api, self.local
        if "zeros" in local:
            fill(api, Lanes(local["zeros"], 0, 1), 0.0, self.buffers["zeros"].elements // 16, mask=16)
        if "scale" in local:
            fill(api, Lanes(local["scale"]), self.spec.scale, 1)
        if "index" in local:
            masks.index_tile(api, local["index"], self.tiles.kv, masks.UNIT)
        if "key_index" in local:
            masks.index_tile(api, local["key_index"], self.tiles.kv)

    def _work(self, *bounds):
        """Everything a core does with its shares, [start, stop) of each outer loop."""
        raise NotImplementedError

    def load_slopes(self, head):
        """Where there is ALiBi: the head's slope, and its products with the key index, of both signs."""
        if self.spec.alibi_shape is None:
            return
        layout.copy(self.api, Place(self.local["slope"]), Place(self.gm["slopes"], head * 16), 16)
        for sign in (0, 1):
            tile = Place(self.local["slope_tiles"], sign * self.tiles.kv * 16)
            slope = Lanes(self.local["slope"], sign * 8, 0)
            masks.slope_tile(self.api, tile, self.local["key_index"], slope, self.tiles.kv)
