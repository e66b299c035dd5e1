"""When to stop: arrays and numbers, no network; needs NumPy only.

`policy` is the contract and the rule of this package, thresholds; `agreement` is another rule, to compare with.
`simulate` replays a rule, `solve` finds thresholds for a budget, `config` is what travels with weights.
"""
