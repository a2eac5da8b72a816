"""A probe inside a training loop: when it measures, what that may cost, and where the reports go."""
