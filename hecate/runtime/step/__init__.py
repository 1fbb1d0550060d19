"""A training step: its passes, its layers, and the record of what they did."""
