"""What the transformer wrappers of both frameworks share: options, rules between them, the plan of a stack.

options -> rules -> path (fused or formed) and plan (the order of the layers). numpy only.
"""
