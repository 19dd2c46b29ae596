"""Joining several processes: what a script calls first under ``python -m flash_attention launch``."""

import os

import jax

from flash_attention.core.errors import invalid_value

VARIABLES = ("FLASH_LAUNCH_ADDRESS", "FLASH_LAUNCH_SIZE", "FLASH_LAUNCH_RANK")


def initialize():
    """``jax.distributed.initialize`` with what the launcher put into the environment; returns (rank, processes).

    Call it before anything else of JAX. Afterwards ``jax.devices()`` are those of all processes, and a mesh over them
    works as on one machine.

    Raises:
        ValueError: the process was not started by the launcher.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        remedy = "Start the script with `python -m flash_attention launch -n N script.py`."
        raise invalid_value("distributed.initialize", missing[0], "set in the environment", None, remedy)
    address, size, rank = (os.environ[name] for name in VARIABLES)
    jax.distributed.initialize(coordinator_address=address, num_processes=int(size), process_id=int(rank))
    return int(rank), int(size)
