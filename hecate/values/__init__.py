"""Tensor values of a model by original names: initial values, checks for NaN, unsharded tensors, memory use."""
