"""Tables whose vectors are computed from few learned numbers."""
