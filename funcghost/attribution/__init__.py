"""Thin pure functions that turn per-sample gradient inner products into attributions."""
