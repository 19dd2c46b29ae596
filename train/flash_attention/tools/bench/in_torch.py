"""The C++ competitor: torch's scaled_dot_product_attention, as a PyTorch user would call it on BNSD tensors."""

import torch
import torch.nn.functional as F

CANDIDATES = ("torch",)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(case, direction, candidate, arrays):
    """``(call, results)``: ``call()`` runs once to completion, ``results()`` gives numpy (out, d_query or None)."""
    spec, dtype = case.spec(), getattr(torch, case.dtype)
    if candidate not in CANDIDATES:
        raise ValueError("no such candidate: {}".format(candidate))
    if not case.plain() and not case.alibi:
        raise ValueError("scaled_dot_product_attention has no such option")
    tensors = (torch.from_numpy(arrays[name]) for name in ("query", "key", "value", "d_out"))
    query, key, value, d_out = (x.to(DEVICE, dtype) for x in tensors)
    options = {"enable_gqa": True} if spec.group > 1 else {}
    simple = not (case.window or case.blocks or case.alibi) and (not case.causal or spec.offset == 0)
    if simple:
        options["is_causal"] = case.causal
    else:
        options["attn_mask"] = _mask(case, dtype).to(DEVICE)
    backward = direction == "fwd+bwd"
    inputs = [x.requires_grad_(backward) for x in (query, key, value)]
    last = {}

    def call():
        last.clear()  # the results of the call before would count as memory of this one
        out = F.scaled_dot_product_attention(*inputs, **options)
        last["grads"] = torch.autograd.grad(out, inputs, d_out) if backward else None
        last["out"] = out.detach()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def results():
        grads = last["grads"]
        return last["out"].float().cpu().numpy(), None if grads is None else grads[0].float().cpu().numpy()

    return call, results


def _mask(case, dtype):
    """Dense mask: boolean keep, or the bias when there is ALiBi (torch has no cheaper way)."""
    keep = torch.from_numpy(case.dense_mask())
    if not case.alibi:
        return keep
    spec = case.spec()
    distance = (torch.arange(spec.q_len)[:, None] + spec.offset - torch.arange(spec.kv_len)[None, :]).abs()
    bias = -torch.from_numpy(case.operands()["alibi_slopes"])[:, None, None] * distance
    return bias.masked_fill(~keep, -torch.inf).to(dtype)


def limits(seconds):
    """What torch reaches here: matmul GFLOP/s by dtype, memory read in GB/s."""
    found = {}
    for name in ("float32", "bfloat16"):
        a = torch.ones((1024, 1024), dtype=getattr(torch, name))
        found["matmul_{}_gflops".format(name)] = 2 * 1024**3 / seconds(lambda a=a: a @ a) / 1e9
    memory = torch.ones(2**26)  # 256 MB: beyond every cache
    found["read_gbytes"] = 4 * memory.numel() / seconds(memory.sum) / 1e9
    return found
