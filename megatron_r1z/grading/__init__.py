"""From a response to a verdict: find the answer, compare it with the references, survive whatever the model wrote.

    answers      where the answer is in a response
    modes        the ways of comparing, as one table

  strict, our own rules (docs/grading.md):
    equality     the order in which the following are asked
    text         the normal form of an answer; words, options
    figures      a number with its thousands as one token
    money        currencies in one spelling
    number_words words that are numbers or change one: `million`, `tenths`, `squared`
    names        what stands before an equation sign; records such as `x=1, y=2`
    numbers      decimals, fractions, percentages, numerals of a base, clock times
    units        units and things counted, split off and compared
    brackets     what belongs together, where a list can be cut
    parts        lists, sets, tuples, matrices, ratios taken apart
    relations    equations and inequalities, intervals and unions
    expression   the grammar of everything else
    arithmetic   what an expression is worth at a point, within bounds
    values       whether two expressions are worth the same
    symbolic     sums, integrals, limits: what is left to sympy, loaded inside its functions

  fast and math_verify, the paper's grader:
    reference    the layers, with `reference_text` and `reference_algebra`

    pool         processes that can be killed, in which comparisons run
    comparer     each pair once: plain to see, remembered, or compared in the pool
    functions    reward functions of the user's own
    grader       `MathGrader`, the door that the loop sees

Nothing in here loads torch or vLLM, since every worker process imports it.
"""
