"""Whole training scripts with a probe in them, one for each way of training; ``python -m`` runs any of them."""
