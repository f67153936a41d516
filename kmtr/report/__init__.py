"""Figures, tables and the HTML report: what a run learned, as a physicist and a clinician want to see it."""
