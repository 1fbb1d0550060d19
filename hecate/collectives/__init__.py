"""Sparse collectives: `schedule` (pure) says who sends what to whom, a transport carries it."""
