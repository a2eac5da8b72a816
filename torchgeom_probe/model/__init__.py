"""What is measured: the hooked model, its inputs, layers and stages; and how it is left as it was."""
