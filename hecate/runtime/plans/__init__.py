"""The way of a plan: from the loads of past steps to who computes what."""
