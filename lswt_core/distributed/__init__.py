"""Data parallelism: the ranks of a run and their collectives."""
