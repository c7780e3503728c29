"""Throughput and memory of contenders that do the same work, measured in one process in interleaved
rounds.
"""
