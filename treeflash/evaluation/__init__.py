"""Measure a drafter: runs, metrics, records, tables, plots, report."""
