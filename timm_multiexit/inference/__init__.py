"""Real early exit: engines run segments of a network, runners decide who leaves, `images` reads files.

`batch_loop`, `device`, `images` and `traffic` need NumPy, Pillow and onnxruntime only; `export` copies them to devices.
"""
