"""Real early exit: engines run segments of a network, runners decide who leaves, `images` reads files.

`batch_loop` and `images` need NumPy and Pillow only.
"""
