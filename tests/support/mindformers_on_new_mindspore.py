"""Importing this lets mindformers 1.3.2 be imported with MindSpore 2.10, which has lost modules of `mindspore.dataset`.

The library names them in classes for images that no test here uses.
"""

import sys
import types

import mindspore.dataset.transforms as transforms
import mindspore.dataset.vision as vision


class _Renamed(types.ModuleType):
    """The module `name`, with what `source` has under the same names, and empty classes for the rest."""

    def __init__(self, name, source):
        super().__init__(name)
        self._source = source

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._source, name, type(name, (), {}))


for _source in (transforms, vision):
    for _name in ("py_transforms", "c_transforms"):
        if not hasattr(_source, _name):
            _module = _Renamed(_source.__name__ + "." + _name, _source)
            setattr(_source, _name, _module)
            sys.modules[_module.__name__] = _module
