"""FlashAttention-2 for Ascend 910A and 310P in TIK. Imports neither MindSpore nor JAX; `tik` is always handed in.

AttentionSpec -> supports (what these kernels take) -> geometry (tiles, padded sizes) -> tasks (what each core visits)
-> budget (buffers) -> forward, backward (the kernels, built from tile_ops) -> host (numpy tensors in and out).
"""
