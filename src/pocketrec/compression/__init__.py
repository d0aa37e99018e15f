"""Budgets, ladders, files that fit, and how they are measured."""
