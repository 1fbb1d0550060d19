"""FSSDP at run time: the ways of an expert, a token and a plan, the rest of the model, and the step around them."""

import sys

import hecate.errors

# Where the exceptions of hecate.errors were at first: code that catches them from there goes on.
sys.modules[f"{__name__}.heartbeat"] = sys.modules[f"{__name__}.finite"] = hecate.errors
