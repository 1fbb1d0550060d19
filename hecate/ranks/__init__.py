"""What ranks must know of each other: whether all hold the same values, which one raised, and which one is missing."""
