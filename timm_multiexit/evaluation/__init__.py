"""What a network is worth on test images: accuracy, calibration, cost and time.

`evaluate` measures exits and average budgets, `results` holds the numbers and is the one reader and writer of
results.json, `figures` draws them, `timing` measures time on this machine. `compare` lays several networks side by
side, `classes` tells classes apart, `logits_file` reads the logits of a network of any kind.
"""
