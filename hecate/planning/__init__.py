"""Integers in, frozen plans out."""
