"""Question and text files: read, put into a template, ordered, reported on, and recognised by their contents.

Rows come from `rows`, prompts from `prompts`, texts from `corpus`, a page from `report`; `changes` compares what a run was made of.
"""
