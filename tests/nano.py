"""The beginning of the recipes that whole runs are tested with: a model so small that a step takes
a hundredth of a second.
"""

NANO = """
[model]
d_model = 32
n_layers = 2
n_heads = 2
[embedding]
vocab_size = 320
d_vocab = 24
[memory.registers]
count = 2
[loss.simctg]
weight = 0.1
[data]
use = "text"
paths = ["{corpus}"]
"""
