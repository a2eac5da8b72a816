"""Mathematics that knows no model: from tangents to log-volumes, Krylov spaces, quadrature, spectra."""
