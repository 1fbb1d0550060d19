"""Training loops of other libraries, with models under FSSDP."""
