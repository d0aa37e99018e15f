"""Layouts of tables whose vectors are computed when they are looked up, one module each. Torch-free."""
