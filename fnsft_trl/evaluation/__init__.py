"""Measures of what was learnt and of what was forgotten."""
