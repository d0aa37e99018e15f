"""Gain-shape trellis coding of ranking tables."""
