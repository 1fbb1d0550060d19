"""The rest of the model: sharded by FSDP2, replicated, or left to the caller."""
