"""FSSDP at run time: experts, tokens, plans, the dense part of the model, and the training step."""

import sys

import hecate.errors

# The exceptions of hecate.errors used to be in these modules; code that imports them from there keeps working.
sys.modules[f"{__name__}.heartbeat"] = sys.modules[f"{__name__}.finite"] = hecate.errors
