"""A warm Python process that runs scripts one after the other, with the Hub's real client: torch is imported once.

It reads one JSON object per line, runs the script as `python SCRIPT ARGS` would, and answers with one JSON object. Of a
script that is to be killed it names the process, and then how that one ended.
"""
import contextlib
import io
import json
import os
import runpy
import sys
import time
import traceback
import warnings

import timm_multiexit  # noqa: F401 - the slow import

_sleep = time.sleep
waits = []


def short_sleep(seconds: float) -> None:
    """Records and shortens the client's waits between attempts; it still makes all of them."""
    if seconds >= 1:
        waits.append(seconds)
    _sleep(min(seconds, 0.01))


def run(script: str, args, env) -> dict:
    before = dict(os.environ)
    os.environ.update(env)
    sys.argv = [script, *args]
    out, err, code = io.StringIO(), io.StringIO(), 0
    waits.clear()
    path = list(sys.path)
    sys.path.insert(0, os.path.dirname(script))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(before)
    return dict(code=code, out=out.getvalue(), err=err.getvalue(), waits=list(waits))


if __name__ == '__main__':
    time.sleep = short_sleep
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # keep other output apart from the answers
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop('apart', False):
            child = os.fork()
            if child == 0:
                run(**request)
                os._exit(0)
            print(child, file=answers, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
        else:
            print(json.dumps(run(**request)), file=answers, flush=True)
