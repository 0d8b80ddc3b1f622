"""`minirl discrepancy`: two engines that transformers can be, compared."""
