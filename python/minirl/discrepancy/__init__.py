"""`minirl discrepancy`: compares the rollout engine of a run with its training engine."""
