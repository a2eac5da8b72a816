"""What is measured: the hooked model, its inputs, its layers and stages; and how nothing about it is different afterwards."""
