"""State by original parameter names."""
