#!/usr/bin/env python3
"""Train a multi-exit network with timm's data, mixup, loss, optimizer, scheduler, EMA and checkpoint utilities.

    python train_timm.py --config timm_multiexit/recipes/msfuse_cifar.cifar10.yaml --data-dir DATA --output RUNS
    torchrun --nproc_per_node 2 train_timm.py ...

Options have timm's names; a YAML file given by --config sets their defaults and the command line overrides it. A run
is kept in OUTPUT/EXPERIMENT: the same command with --resume auto continues after the last finished epoch and ends
with the weights that the uninterrupted run would have had. `final/` there then holds the weights (EMA if kept) as
safetensors, with the recipe and the history of the run.
"""
from timm_multiexit.errors import run_command


def main(argv=None) -> None:
    def run(argv):
        # Imported here, so that with a timm too old for training the error is one line.
        from timm_multiexit.training.options import parse_train_args
        from timm_multiexit.training.run import train
        train(parse_train_args(__doc__.splitlines()[0], argv))

    if status := run_command('train_timm.py', run, argv, bad_input=1):
        raise SystemExit(status)


if __name__ == '__main__':
    main()
