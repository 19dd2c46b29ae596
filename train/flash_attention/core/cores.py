"""How many cores this process may use."""

import os


def cores():
    """Cores in this process's affinity mask; all of them where the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
