"""Engine 'aclnn': the vendor's attention operator on Atlas A2 and A3. From documentation only, not run on a device.

constraints.py holds the documentation's limits, mapping.py the decisions, tensors.py the arguments, passes.py forward
and backward, device.py asks where we are, engine.py is the entry; model.py is the operator in numpy, for the tests.
"""

from flash_attention.ops.aclnn.engine import ENGINE

__all__ = ["ENGINE"]
