"""What a run costs, before it is started: memory of each rank, seconds of each phase, and the layouts that fit a cluster."""
