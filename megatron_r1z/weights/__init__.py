"""Weights in files: Hugging Face folders, checkpoints of a run, one as the other.

`export` and `hf_files` are about the former, `checkpoint` and `resume_point` about the latter, `convert` about both.
"""
