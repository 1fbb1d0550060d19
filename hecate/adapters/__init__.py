"""Finding the experts modules of a model."""
