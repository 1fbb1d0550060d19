"""Movement of tokens between devices: counting them, sending them to experts, and combining the results."""
