"""Saving and loading the training state under the model's original parameter names."""
