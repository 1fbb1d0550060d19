"""Coordination of ranks: check that all hold the same values, raise an error of one on all, find missing ranks."""
