"""What a trained model does with its memory and its context, measured on texts."""
