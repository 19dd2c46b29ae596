"""The mechanisms, registered by importing their files: a new group is one file beside this one and one name below."""

from flash_attention.jax.flexible.mechanisms import dense, flash  # noqa: F401
