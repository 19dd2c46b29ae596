"""The messages that context parallelism sends, as differentiable Cells, with two back ends.

'device' (device.py): Send, Receive, AlltoAll, AllGather, ReduceScatter. Ascend; not run on device.
'gathered' (gathered.py): AllGather, AllReduce and slicing, all that MindSpore has on the CPU. Sends more than needed.

Each has the four Cells of base.py: Permute, AllToAll, AllGather, ReduceScatter.
"""

from flash_attention.ops.collectives.base import ALONE, Group, choose, current_group, shift

__all__ = ["ALONE", "Group", "choose", "current_group", "shift"]
