"""Carries out a plan: moves weights between the parameters of ranks."""
