"""FP8: the numbers (`blocks.py`), and what a recipe asks of machine, model and libraries (`recipes.py`).

`machine.py` says what the machine can do, `compiled.py` has the loops.
"""
