"""From a response to a verdict: find the answer, compare it with the references, survive whatever the model wrote.

    answers    where the answer is in a response
    text       the normal form of an answer, its numbers, units and parts
    symbolic   algebraic equality; the only module that loads sympy, and only inside its functions
    equality   the order in which the two are asked
    pool       processes that can be killed, in which comparisons run
    grader     `MathGrader`, the door that the loop sees

Nothing in here loads torch or vLLM, since every worker process imports it.
"""
