"""A training step: its forward and backward passes, its MoE layers, and the records of what the layers did."""
