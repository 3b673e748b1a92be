"""Held-out questions: sampled and judged by `evaluate`, turned into figures with intervals by `scores`."""
