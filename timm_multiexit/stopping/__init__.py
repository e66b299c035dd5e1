"""When to stop: arrays and numbers, no network; needs NumPy only.

`policy` is the contract and the one stopping rule, `simulate` replays it, `solve` finds thresholds for a budget,
`config` is what travels with weights.
"""
