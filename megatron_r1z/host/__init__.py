"""What a machine is to a run: processes, memory that ranks share, streams, the collector, loops that numba compiles.

Every file may be imported; none knows of models.
"""
