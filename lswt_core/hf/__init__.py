"""Models as citizens of the HuggingFace ecosystem: config and model classes, export, and the
original authors' checkpoints.
"""
