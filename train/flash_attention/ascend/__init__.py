"""FlashAttention-2 for Ascend 910A and 310P in TIK. Imports neither MindSpore nor JAX; `tik` is always handed in.

AttentionSpec -> limits (what these kernels take) -> tiles (which tiles, by budget and cost model) -> geometry (padded
sizes) -> tasks (what each core visits) -> kernel, score_tile (what both kernels share) -> forward with query_tile,
preprocess and backward with backward_pair (the kernels, made of tile_ops) -> host, preprocess_arguments,
backward_arguments (numpy tensors in and out)
-> simulated (the kernels as numpy functions, on the simulator).
"""
