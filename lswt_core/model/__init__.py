"""The model: decoder, attention, embedding, losses, and how a recipe becomes one."""
