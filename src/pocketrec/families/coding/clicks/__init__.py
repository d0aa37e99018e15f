"""Transform coding of click tables and heads."""
