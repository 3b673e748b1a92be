"""Which rank holds which box of which tensor, and the plan that moves weights between two such layouts; standard library only."""
