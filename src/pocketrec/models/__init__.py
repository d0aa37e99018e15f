"""A table, a head around it, and a loss."""
