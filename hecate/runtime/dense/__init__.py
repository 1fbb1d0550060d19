"""The dense part: all parameters other than experts. Sharded by FSDP2, replicated, or left to the caller."""
