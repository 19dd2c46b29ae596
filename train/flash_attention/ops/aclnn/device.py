"""Which device MindSpore runs on, asked as late as possible: engine 'aclnn' exists on Atlas A2 and A3 only."""

from flash_attention.core.errors import Reason

SOCS = ("ascend910b", "ascend910_93")
"""Prefixes of the names that MindSpore gives the processors of Atlas A2 and Atlas A3, in lower case."""

_REMEDY = "Use engine='portable', or leave the choice to 'auto'."


def soc_name():
    """'CPU', 'GPU', or the Ascend processor's name, 'Ascend' where this MindSpore cannot tell which."""
    import mindspore as ms

    target = ms.get_context("device_target")
    if target != "Ascend":
        return target
    from mindspore._c_expression import MSContext

    ask = getattr(MSContext.get_instance(), "get_ascend_soc_version", None)
    return (ask() if ask else "") or "Ascend"


def refused(name=None):
    """The :class:`Reason` why this computer cannot run the operator, or None. ``name`` replaces the device's."""
    from mindspore import ops

    name = soc_name() if name is None else name
    if not name.lower().startswith(SOCS):
        return Reason("engine", name, "used on Atlas A2 or A3 (Ascend910B, Ascend910_93)", _REMEDY)
    if not hasattr(ops, "flash_attention_score"):
        return Reason("engine", "no ops.flash_attention_score", "used with MindSpore 2.3 or newer", _REMEDY)
    return None
