"""Benchmarks: `python -m benchmarks.<name> --json FILE`; one JSON format for all (benchmarks/report.py)."""
