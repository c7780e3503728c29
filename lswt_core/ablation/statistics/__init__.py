"""Statistics of ablations: pure functions of numbers."""
