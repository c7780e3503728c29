"""Acceptance of a machine: checks and benchmarks on whatever accelerator is there, each in a
process that may fail, hang or crash (``bench --acceptance``).
"""
