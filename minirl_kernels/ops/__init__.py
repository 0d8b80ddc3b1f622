"""Ops, one folder each: op.py the contract, reference.py what is correct, one file per backend."""
