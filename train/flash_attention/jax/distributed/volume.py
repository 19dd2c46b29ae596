"""Bytes that a device sends, as formulas over a Plan: what 'auto' chooses by, and what a test counts in the program.

Queries, keys, values, outputs and their gradients; what has an entry for each score (mask, bias), segment ids and a
returned LSE come on top. All-to-all, all-gather and reduce-scatter count what leaves the device; all-reduce twice that.
"""

MESSAGE = 2**20
"""Bytes that could be sent in the time that one message takes to start."""

HELD = 2**26
"""'gather' is left out of the automatic choice when it would hold more bytes of keys and values than this."""

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def _sizes(plan):
    """Bytes on one device of (queries, keys and values before the all-to-all, and after it)."""
    spec = plan.spec
    row = spec.batch // plan.batch_parts * spec.head_dim * _BYTES[spec.dtype]
    q = row * plan.local_heads * (spec.q_len + plan.q_pad) // (1 if plan.strategy == "merge" else plan.parts)
    kv = 2 * row * (spec.kv_len + plan.kv_pad) // plan.parts
    return q, kv * plan.local_kv_heads, kv * plan.ring_kv_heads * plan.ulysses


def _hop_count(plan):
    return sum(count for _, count in plan.hops)


def travel(plan):
    """Bytes of the keys and values on their way round, in one direction of differentiation."""
    return _hop_count(plan) * _sizes(plan)[2]


def _exchanges(plan):
    """Bytes of the all-to-all and of the zig-zag placement, of all tensors, one way."""
    q, kv, ring_kv = _sizes(plan)
    u, total = plan.ulysses, 0
    if u > 1:
        split = plan.local_kv_heads % u == 0
        total += 2 * q * (u - 1) // u + (kv * (u - 1) // u if split else kv * (u - 1))
    if plan.zigzag:
        total += 2 * q + ring_kv
    return total


def _all_reduce(size, parts):
    return 2 * size * (parts - 1) // parts


def forward(plan):
    """Bytes of the forward direction."""
    if plan.strategy == "gather":
        return _sizes(plan)[1] * (plan.parts - 1)
    if plan.strategy == "merge":
        spec = plan.spec
        rows = spec.batch // plan.batch_parts * plan.local_heads * spec.q_len * 4
        return _all_reduce(rows * (spec.head_dim + 2), plan.parts)
    return _exchanges(plan) + travel(plan)


def backward(plan):
    """Bytes of the backward direction; the gradients of keys and values travel in float32. Not of 'merge': None."""
    if plan.strategy == "merge":
        return None
    if plan.strategy == "gather":
        return forward(plan)
    sums = 4 * _sizes(plan)[2] // _BYTES[plan.spec.dtype]
    # The first direction sends sums from the start, the others from their first hop on; both send them home at the end.
    hops = sum((count + 1 if number == 0 else count) * (count > 0) for number, (_, count) in enumerate(plan.hops))
    return _exchanges(plan) + travel(plan) + hops * sums


def cost(plan):
    """What the automatic choice minimises: bytes of the forward, a message counting as MESSAGE of them."""
    if plan.strategy == "gather":
        held = _sizes(plan)[1] * plan.parts
        return float("inf") if held > HELD else forward(plan) + 2 * MESSAGE
    messages = 2 * _hop_count(plan) + (4 if plan.ulysses > 1 else 0) + (8 if plan.zigzag else 0)
    return forward(plan) + messages * MESSAGE
