"""Plug-in axis, one file each: a raw log format. ``pocketrec.sources.ClassName`` loads on first use."""

from pocketrec.registry import attributes

__getattr__, __dir__ = attributes("sources")
