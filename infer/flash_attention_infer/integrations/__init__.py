"""Cached decoding of the model libraries that ``flash_attention.integrations`` knows, one late-imported file each."""
