"""Plans: from the loads of past steps to which device computes which tokens."""
