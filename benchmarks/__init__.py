"""Benchmarks: one file a question, one table each; ``python -m benchmarks`` answers all and writes the page."""
