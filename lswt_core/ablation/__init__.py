"""Ablations: arms that differ from a baseline in one thing, several seeds each, and what can
honestly be said of them.
"""
