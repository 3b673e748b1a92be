"""`megatron-r1z launch`: from a run's file to a job of nemo-run, and what became of it.

The only home of nemo-run, which needs an environment of its own (`make launch-env`): it cannot share one with vLLM. Nothing here imports
torch, Megatron or vLLM.

    job.py          what is to be started: command, code, nodes and ranks
    executors.py    where: our `launch` section as one of nemo-run's executors
    experiments.py  submit, watch, and later: state, logs and end of what was submitted
    recipes.py      the same from Python, as users of NeMo write it
"""
