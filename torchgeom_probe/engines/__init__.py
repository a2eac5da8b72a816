"""The three ways to differentiate a model: fused (the dual pass), functorch (vmap of jvp), vjp (reverse mode)."""
