"""What a run costs, before it is started: memory of each rank, seconds of each phase, and the layouts that fit a cluster.

`plan_run` answers for a configuration, `search` for its neighbours, `refit_report` for a hand-over of weights, `report` prints.
"""
