"""One small, complete plugin of every kind: what ``plugins new`` writes, with another name in it."""
