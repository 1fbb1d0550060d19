"""What all ranks agree on, and which of them is missing."""
