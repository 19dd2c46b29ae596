"""What every integration shares: the versions that were tested, and replacements that can be taken back."""

import sys

from flash_attention.core.errors import Reason


class Patches:
    """Replaced attributes of a library. ``undo`` puts the old ones back, and so does the end of a ``with`` block."""

    def __init__(self):
        self._undo = []

    def set(self, owner, name, value):
        """``setattr(owner, name, value)``, to be taken back; an attribute that was not there is removed again."""
        missing = object()
        before = vars(owner).get(name, missing)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if before is missing else setattr(owner, name, before))

    def put(self, mapping, key, value):
        """``mapping[key] = value`` for a key that is new, to be taken back."""
        mapping[key] = value
        self._undo.append(lambda: mapping.pop(key))

    def exchange(self, package, old, new):
        """Replace ``old`` by ``new`` under whatever name a loaded module of ``package`` holds it.

        Modules that are loaded later take it from where it is defined. Undoing looks at them too.
        """
        _exchange(package, old, new)
        self._undo.append(lambda: _exchange(package, new, old))

    def undo(self):
        """Take everything back, the last replacement first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def _exchange(package, old, new):
    for module_name, module in list(sys.modules.items()):
        if module is not None and (module_name + ".").startswith(package + "."):
            for name in [name for name, value in list(vars(module).items()) if value is old]:
                setattr(module, name, new)


def check_version(layer, library, tested, any_version):
    """Raise unless the version of the imported ``library`` was tested, or the caller takes any."""
    version = getattr(library, "__version__", "unknown")
    if version not in tested and not any_version:
        need = "one of the tested versions {}".format(", ".join(tested))
        remedy = "Install one of those, or try this one with any_version=True."
        raise Reason(library.__name__, version, need, remedy).error(layer)
    return version
