"""From a hooked model to the Jacobians of its layers: fused (the dual pass), functorch (vmap of jvp), vjp (reverse mode)."""
