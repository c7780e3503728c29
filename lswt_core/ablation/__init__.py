"""Ablations: arms that differ from a baseline in one swap, trained with several seeds each, and the
statistics of their paired differences.
"""
