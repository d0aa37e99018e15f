"""Time and peak memory of every phase, each in a process of its own."""
