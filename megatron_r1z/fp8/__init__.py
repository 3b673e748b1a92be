"""FP8: the numbers (`blocks.py`), and what a recipe asks of machine, model and libraries (`recipes.py`)."""
