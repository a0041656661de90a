"""Moving weights while they train: the manifold, projections, and the optimizer that applies them."""
