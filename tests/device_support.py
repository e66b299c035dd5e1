"""run.py of an exported folder, in a process that has NumPy, Pillow and onnxruntime alone."""
import subprocess
import sys

BLOCKED = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        allowed = {'numpy', 'PIL', 'onnxruntime', 'timm_multiexit', 'flatbuffers', 'google', *sys.stdlib_module_names}
        if name.partition('.')[0] not in allowed:
            raise ImportError(f'{name} is not on the device')
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def on_device(folder, *args):
    return subprocess.run([sys.executable, '-I', '-c', BLOCKED, str(folder / 'run.py'), *map(str, args)],
                          capture_output=True, text=True)
