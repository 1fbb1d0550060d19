"""An error on one rank becomes an error on all, instead of a hang of the others."""

from hecate.collectives.ranks import agree, gather, on_rank_0, rank_and_world

__all__ = ["agree", "gather", "on_rank_0", "rank_and_world"]
