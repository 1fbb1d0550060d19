"""Storage and movement of experts: pools of owned experts, copies and their buffers, re-sharding, optimizer state."""
