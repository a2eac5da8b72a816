"""From a hooked model to the Jacobians of its layers: fused (the dual pass), functorch, vjp (reverse mode)."""
