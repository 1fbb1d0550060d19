"""Sparse collectives: `schedule` says who gets what, `route` how its pieces travel (both pure), a transport carries them."""
