"""One small, complete plugin of every kind; ``plugins new`` writes it under another name."""
