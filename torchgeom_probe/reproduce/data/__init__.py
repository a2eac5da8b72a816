"""The data sets of the figures: what is embedded in well-known packages, and what torchvision can fetch."""
