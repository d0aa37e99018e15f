"""The file: how tables, heads and vocabularies lie in it, and how they are read without unpacking. Torch-free."""
