"""Carries out a plan: moves weights between the parameters of ranks.

`refit` is the hand-over to an engine, `gather` the same through vLLM's own loader, `once` moves weights from and to files.
"""
