"""The way of a token: counts, dispatch, exchange, combine."""
