"""Everything that `train_timm.py` does: `options` parses, `run` resumes, trains, logs and exports (`run_folder` owns
its files, `history` the record of where weights come from), `trainer` owns network, optimizer and one epoch, `task` the
loss of all exits, `loader` the batches.

`throughput` measures; `precision`, `cuda_graph` and `cpu_kernels` make steps fast on particular machines.
"""
from ..optional import require_timm

require_timm('1.0.31', 'training')
