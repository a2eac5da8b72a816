"""Results as matplotlib figures.  Imports results; no result imports it at the top."""
