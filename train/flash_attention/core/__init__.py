"""The numpy-only core. Read in this order: spec, ranges, plan, reference.

Everything an attention call *means* is here, once; engines only decide how to compute it.
"""
