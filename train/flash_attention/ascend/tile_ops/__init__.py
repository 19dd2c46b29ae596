"""Tile operations: the steps of the kernels, each a function that issues TIK instructions on an instance `api`.

Local tensors are one-dimensional. A *score tile* is transposed: ``[q1][key][16 queries]``, which is S^T (rows = keys,
columns = queries) in the cube's zN layout. So the 16 contiguous lanes are 16 queries, a maximum over keys is an
elementwise maximum of whole repeats, and everything that belongs to a query is one value a lane.

A *statistic* holds one fp32 value a query as four copies, ``[q1][64 lanes]`` with lane ``l`` for query ``l % 16``: one
repeat of 64 lanes is four keys x 16 queries of a score tile, so a statistic is an operand with repeat stride 0.
"""
