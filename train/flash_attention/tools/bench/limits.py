"""The machine's own limits, measured in the same run as the table they stand beside."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flash_attention.tools.bench.measure import Failed
from flash_attention.tools.bench.worker import best_seconds
from flash_attention.tools.machine import cores


def measure(pool, frameworks):
    """``{"numpy": {...}, framework: {...}}``: GFLOP/s, Gelem/s, GB/s; a framework that is absent says so."""
    found = {"numpy": numpy_limits()}
    for framework in frameworks:
        try:
            found[framework] = pool.get(framework).ask("limits")
        except Failed as reason:
            found[framework] = {"failed": str(reason)}
    return found


def numpy_limits():
    """Matrix product, exponential and memory read with numpy, on all cores of this process."""
    a = np.ones((1024, 1024), np.float32)
    x = np.linspace(-8, 0, 2**18, dtype=np.float32)
    memory = np.ones(2**26, np.float32)  # 256 MB: beyond every cache
    parts = np.array_split(memory, cores())
    with ThreadPoolExecutor(cores()) as threads:

        def read():
            list(threads.map(np.max, parts))  # max is vectorised and leaves the GIL

        def exponentials():
            list(threads.map(np.exp, [x] * cores()))

        return {
            "matmul_float32_gflops": 2 * 1024**3 / best_seconds(lambda: np.dot(a, a)) / 1e9,
            "exp_gelem": cores() * x.size / best_seconds(exponentials) / 1e9,
            "read_gbytes": memory.nbytes / best_seconds(read) / 1e9,
        }
