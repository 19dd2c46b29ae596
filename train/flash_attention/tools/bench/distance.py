"""How far apart the cores are: nanoseconds that a byte takes from one core to another and back.

The host of a virtual machine moves its cores about. While two of them do not share a cache, whatever hands data from
core to core at every small operation slows down (measured on an AMD EPYC, 250 against 450 ns: XLA to 1.7 times its
time, torch not at all). Rounds measured then say more about the host than about the candidates.
"""

import mmap
import os
import time

_TRIPS = 1500
_FAR = 1.35
"""A round trip so many times the shortest seen was made between cores without a common cache."""


def round_trip():
    """Nanoseconds of a round trip between two cores, infinite when they are busy with other processes.

    None on one core, or where processes cannot be pinned.
    """
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return None
    mine, other = sorted(os.sched_getaffinity(0))[:2]
    before = os.sched_getaffinity(0)
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {other})
        _answer(shared)
        os._exit(0)
    try:
        os.sched_setaffinity(0, {mine})
        return _ask(shared)
    finally:
        os.sched_setaffinity(0, before)
        os.waitpid(child, 0)


def _ask(shared):
    """Median time of the round trips; infinite when the other process does not get its turn."""
    times = []
    for trip in range(_TRIPS):
        number = 2 * trip % 128 + 1
        begin = time.perf_counter()
        shared[0] = number
        if not _turns_to(shared, number + 1):
            return float("inf")
        times.append(time.perf_counter() - begin)
    return sorted(times)[_TRIPS // 2] * 1e9


def _answer(shared):
    for trip in range(_TRIPS):
        number = 2 * trip % 128 + 1
        if not _turns_to(shared, number):
            return
        shared[0] = number + 1


def _turns_to(shared, number):
    """Spin until the shared byte is ``number``; False after a second or so, when the machine is busy with others."""
    for _ in range(2**24):
        if shared[0] == number:
            return True
    return False


class Cores:
    """Whether the cores are near each other now, judged by the shortest round trip seen.

    Args:
        measure: gives a round trip in nanoseconds, or None.
        nearest: the shortest one known from before, or None.
        patience: seconds to wait in all for cores that are far apart to come near again.
    """

    def __init__(self, measure=round_trip, nearest=None, patience=0.0):
        self._measure, self.nearest, self.patience = measure, nearest, patience

    def near(self):
        """False while the cores are far apart; True where that cannot be measured."""
        now = self._measure()
        if now is None:
            return True
        self.nearest = now if self.nearest is None else min(now, self.nearest)
        return now <= _FAR * self.nearest

    def wait(self, pause=1.0):
        """Wait until the cores are near, as long as there is patience left; returns whether they are."""
        near = self.near()
        while not near and self.patience > 0:
            time.sleep(pause)
            self.patience -= pause
            near = self.near()
        return near
