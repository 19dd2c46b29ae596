"""One asymmetric mask through the MindSpore calls of core/conventions.py."""

import importlib

import numpy as np
import pytest
from mindspore import Tensor
from support.conventions import KINDS, draws, expected, mask_of, takes_any_mask

from flash_attention.core.conventions import CALLS

pytestmark = [pytest.mark.level0, pytest.mark.platform_x86_cpu]
IN_MINDSPORE = [call for call in CALLS if ".jax." not in call.path and takes_any_mask(call)]


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", IN_MINDSPORE, ids=lambda call: call.path)
def test_mask(call, kind, layout):
    if layout not in call.layout:
        pytest.skip("this call has one layout")
    module, name = call.path.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    q, k, v, keep = draws()
    mask = {call.mask_argument: Tensor(mask_of(call.polarity, kind, keep))}
    if name == "FlexibleAttention":
        function = function("flash_attn2", q.shape[1], q.shape[-1], k.shape[1], causal=False)
    if call.layout == "BNSD":
        found = function(q.shape[-1])(Tensor(q), Tensor(k), Tensor(v), **mask).asnumpy()
    elif layout == "BNSD":
        found = function(Tensor(q), Tensor(k), Tensor(v), layout="BNSD", **mask).asnumpy()
    else:
        swapped = (Tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v))
        found = function(*swapped, **mask).asnumpy().swapaxes(1, 2)
    np.testing.assert_allclose(found, expected(), atol=2e-5)
