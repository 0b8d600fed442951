"""Solvers, the distilled set on disk and the choice of a step count: used by sample.py."""
