"""The way of an expert: pool, copies, buffers, and what moves them."""
