"""Metrics, baselines, and the comparison of networks with them."""
