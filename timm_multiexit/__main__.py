"""Runs a script of timm with this package's networks registered: `python -m timm_multiexit validate.py ARGS`."""
import runpy
import sys
from pathlib import Path

import timm_multiexit  # noqa: F401 - registers the networks

if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    given = f"'{sys.argv[1]}' is not a file" if len(sys.argv) > 1 else 'no script given'
    sys.exit(f'{given}; use: python -m timm_multiexit SCRIPT ARGS, with a script of timm such as validate.py')
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name='__main__')
