"""Plug-in axis, one file each: a recommender. ``pocketrec.backbones.ClassName`` loads on first use."""

from pocketrec.registry import attributes

__getattr__, __dir__ = attributes("backbones")
