"""Plug-in axis, one file each: a way to a smaller table. ``pocketrec.methods.ClassName`` loads on first use."""

from pocketrec.registry import attributes

__getattr__, __dir__ = attributes("methods")
