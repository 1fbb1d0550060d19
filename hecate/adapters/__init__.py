"""Which modules of a model are experts."""
