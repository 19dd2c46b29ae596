"""The registered mechanisms, each registered by importing its file: a new group is one file here and one name below."""

from flash_attention.jax.flexible.entries import dense, dilated, flash, landmark, platform  # noqa: F401
