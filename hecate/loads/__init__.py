"""How many tokens each expert gets: history, prediction, traces and generators."""
