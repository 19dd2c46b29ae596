"""Records: frozen dataclasses with replace, to_dict/from_dict and to_json/from_json that lose nothing."""

import base64
import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flash_attention.core.errors import invalid_type
from flash_attention.jax.engines.cpu import named_dtype


class Record:
    """Mixin of frozen dataclasses. JSON keeps arrays (dtype, shape, bits), dtypes, tuples, meshes and other records."""

    def replace(self, **changes):
        """A copy with these fields changed; an unknown name is a TypeError."""
        return dataclasses.replace(self, **changes)

    def to_dict(self):
        """``{field: value}``, the values as they are."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields):
        """The record whose :meth:`to_dict` is ``fields``."""
        return cls(**fields)

    def to_json(self):
        """JSON text; :meth:`from_json` gives an equal record."""
        return json.dumps({name: _encode(name, value) for name, value in self.to_dict().items()})

    @classmethod
    def from_json(cls, text):
        """The record that :meth:`to_json` wrote. A mesh is built on the devices of the same ids."""
        return cls(**{name: _decode(value) for name, value in json.loads(text).items()})


def _encode(name, value):
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, tuple):
        return {"tuple": [_encode(name, item) for item in value]}
    if isinstance(value, (jax.Array, np.ndarray)):
        x = np.asarray(value)
        return {"array": base64.b64encode(x.tobytes()).decode(), "dtype": str(x.dtype), "shape": x.shape}
    if isinstance(value, Mesh):
        ids = [device.id for device in value.devices.flat]
        return {"mesh": ids, "shape": value.devices.shape, "axes": value.axis_names}
    if isinstance(value, Record):
        kind = type(value)
        return {"record": value.to_json(), "module": kind.__module__, "class": kind.__qualname__}
    if isinstance(value, (np.dtype, type)) and hasattr(value, "dtype" if isinstance(value, type) else "name"):
        return {"dtype": jnp.dtype(value).name}
    need = "None, a number, str, tuple, array, dtype, Mesh or Record to become JSON"
    raise invalid_type("to_json", name, need, "{!r} ({})".format(value, type(value).__name__), "Use to_dict.")


def _decode(value):
    if not isinstance(value, dict):
        return value
    if "ellipsis" in value:
        return ...
    if "tuple" in value:
        return tuple(_decode(item) for item in value["tuple"])
    if "array" in value:
        bits = np.frombuffer(base64.b64decode(value["array"]), named_dtype(value["dtype"]))
        return jnp.asarray(bits.reshape(value["shape"]))
    if "mesh" in value:
        devices = {device.id: device for device in jax.devices()}
        return Mesh(np.array([devices[i] for i in value["mesh"]]).reshape(value["shape"]), tuple(value["axes"]))
    if "record" in value:
        kind = getattr(importlib.import_module(value["module"]), value["class"])
        return kind.from_json(value["record"])
    return named_dtype(value["dtype"])
