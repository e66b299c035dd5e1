"""`timm-multiexit detach DIR`: the backbone under the exits, as the plain timm model that it was before."""
import argparse
from pathlib import Path

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf  # private: the public save_for_hf writes in other precision

from ..errors import InputError
from ..files import replaced
from ..models import MultiExitBackbone
from ..pretrained.hub_files import CONFIG_FILE, WEIGHTS_FILE
from ..pretrained.load import load_model

# What the exits were trained with, and so the backbone is to be used with.
_OF_THE_NETWORK = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'detach', help='the backbone of a network, as a plain timm model',
        description="Writes the timm model that exits were added to, with the network's weights: timm.create_model("
                    "'local-dir:OUTPUT', pretrained=True) loads it, without this package.")
    parser.add_argument('folder', metavar='DIR', help='folder of a network: final/ of a run')
    parser.add_argument('--output', metavar='DIR', default='', help='new folder (default: DIR-backbone)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    output = Path(args.output or f'{folder.resolve()}-backbone')
    if output.exists():
        raise InputError(f"'{output}' exists: name a new folder with --output")
    net = load_model('', folder)
    if not isinstance(net, MultiExitBackbone):
        raise InputError(f"'{folder}' holds a {type(net).__name__}, which is not built on a backbone of timm's")
    model = net.backbone
    cfg = {name: net.pretrained_cfg[name] for name in _OF_THE_NETWORK if net.pretrained_cfg.get(name)}
    names = net.pretrained_cfg.get('label_names')
    with replaced(output, CONFIG_FILE) as made:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, made / WEIGHTS_FILE, {'format': 'pt'})
        save_config_for_hf(model, str(made / CONFIG_FILE), model_config=dict(
            pretrained_cfg=cfg, **({'label_names': list(names)} if names else {})))
    print(f"written: {output}, timm.create_model('local-dir:{output}', pretrained=True) loads it")
