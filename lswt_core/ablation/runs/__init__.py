"""The runs of an ablation: each in a process of its own, kept in a store under a key of everything
that its numbers depend on.
"""
