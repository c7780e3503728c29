"""The report of an ablation: what its numbers say, as data, text, page and pictures."""
