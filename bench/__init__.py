"""Benchmarks: every way of drafting side by side, and reports."""
