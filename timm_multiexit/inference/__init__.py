"""Real early exit: engines run segments of a network, runners decide who leaves, `images` reads files.

`batch_loop`, `device` and `images` need NumPy and Pillow only; `export` copies them to devices.
"""
