"""How good a drafter is: runs, metrics, records, tables, plots, report."""
