"""The tables of a report, in the papers' layout: one module for each section of the page."""
