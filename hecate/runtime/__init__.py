"""FSSDP at run time: pool (owned experts), copies, exchange, layer, engine."""
