"""Decision boundaries, and whether a network magnifies near them."""
