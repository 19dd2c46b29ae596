"""`bench`: named benchmarks (:mod:`registry`, the suites) run candidates in worker processes and write tables.

suite -> Job -> measure (parent) -> worker (child, one a framework) -> in_jax | in_torch | in_mindspore -> judge
"""
