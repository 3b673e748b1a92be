"""What a base model can do before any reinforcement learning: section 2 and appendices C to E of arXiv 2503.20783.

`analyse` samples, `judge` asks another model about the responses, `examine` and `figures` turn them into numbers, `report` and `plots`
show these.
"""
