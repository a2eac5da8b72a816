"""Bindings to the frameworks that users have: each module imports its framework and adds no mathematics."""
