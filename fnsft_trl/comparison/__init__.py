"""Comparison: how alike networks are, and whether two models are related."""

from .fingerprint import network_time_courses
from .similarity import TemplateComparison, compare_templates, compare_time_courses


__all__ = ["TemplateComparison", "compare_templates", "compare_time_courses", "network_time_courses"]
