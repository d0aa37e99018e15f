"""Rate-distortion coding of tables: one pipeline for clicks, one for lists."""
