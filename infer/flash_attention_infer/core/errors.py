"""Errors of the caches. Each is raised before anything is changed: the cache is afterwards what it was before."""


class CacheError(RuntimeError):
    """Base of what a cache raises besides errors of its arguments."""


class OutOfBlocksError(CacheError):
    """No room for the tokens asked for, also after the eviction hook."""


class DoubleFreeError(CacheError):
    """A block was to be released more often than it is held."""


class StaleSequenceError(CacheError):
    """A sequence id that is not (or no longer) in the cache."""
