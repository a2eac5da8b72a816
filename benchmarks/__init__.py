"""What the dual pass costs, measured: ``python -m benchmarks``."""
