"""Planning: integer loads in, frozen plans out. Needs no process group."""
