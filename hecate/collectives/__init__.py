"""Sparse collectives: `schedule` says who gets what, `route` how pieces travel (both pure), a transport does it."""
