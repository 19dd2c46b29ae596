"""FlashAttention-2 for Ascend 910A and 310P in TIK. Imports neither MindSpore nor JAX; `tik` is always handed in.

AttentionSpec -> limits (what these kernels take) -> geometry (tiles, padded sizes) -> tasks (what each core visits)
-> budget (buffers) -> forward, query_tile (the kernel, made of tile_ops) -> host (numpy tensors in and out)
-> simulated (the kernel as a numpy function, on the simulator).
"""
