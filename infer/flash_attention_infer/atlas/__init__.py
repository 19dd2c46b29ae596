"""Attention over a cache by the operators of Atlas A2 and A3. From documentation only, not run on a device.

mapping.py holds the decisions and the documentation's limits, attention.py the tensors, model.py the operators in
numpy, for the tests.
"""
