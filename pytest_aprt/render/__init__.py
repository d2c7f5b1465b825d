"""Renderers of a report: each takes the report and returns text, and knows nothing else."""
