"""TensorBoard's Geometry tab: installed as ``torchgeom_tab``, so that a TensorBoard server need not load torch."""
