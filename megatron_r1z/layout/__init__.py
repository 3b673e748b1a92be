"""Which rank holds which box of which tensor, and the plan that moves weights between two such layouts; standard library only.

Every file of the folder may be imported; README.md here says which is for what.
"""
