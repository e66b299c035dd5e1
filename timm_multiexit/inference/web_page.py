"""A static page that classifies in the browser: the single ONNX file, onnxruntime-web, and policies for a slider.

Everything that the page reads lies in its folder, so that any static file server will do and nothing leaves its origin.
"""
import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Optional, Union

from ..errors import InputError
from ..files import replaced, write_json, written_beside
from ..models import MultiExitNet
from ..pretrained.record import training_data
from ..stopping.config import ExitConfig
from .export import PACKAGE, preprocessing_of
from .profile import cache_folder
from .single_file import export_single_file

ABOUT_NAME = 'page.json'
BUDGETS = 12  # steps of the slider
VERSION = '1.30.0'  # of onnxruntime-web
INTEGRITY = 'sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
# Of its package, what runs on the CPU with one thread; .mjs becomes .js, since some servers know no type for it.
RUNTIME = {'ort.wasm.min.js': 'ort.js', 'ort-wasm-simd-threaded.mjs': 'ort-wasm.js',
           'ort-wasm-simd-threaded.wasm': 'ort-wasm.wasm'}


def export_web(
        model: MultiExitNet,
        config: ExitConfig,
        folder: Union[str, Path],
        name: str,
        runtime: Optional[Union[str, Path]] = None,
) -> None:
    """Writes the folder of the page beside its place and renames it.

    Args:
        model: The network, in eval mode, with its record.
        config: Its exit config, with scores.
        folder: Where to write; an earlier page there is replaced, anything else is refused.
        name: Name of the network, for the page.
        runtime: The package onnxruntime-web of this version, a .tgz file; None for the one in the user's cache folder,
            where it is downloaded once.

    Raises:
        InputError: as `single_file.export_single_file`, the folder holds something else, no onnxruntime-web, or
            a network of images with more than 8 bits.
    """
    if training_data(model).value_range is not None:
        raise InputError('browsers keep 8 bits of a channel, and these images have more: export with --output')
    package = Path(runtime) if runtime else cache_folder() / f'onnxruntime-web-{VERSION}.tgz'
    with replaced(folder, ABOUT_NAME) as made:
        if not runtime and not package.is_file():
            _download(package)
        _check(package)
        export_single_file(model, config, made / 'network.onnx')
        with tarfile.open(package) as files:
            for source, target in RUNTIME.items():
                member = files.extractfile(f'package/dist/{source}')
                assert member is not None  # the package is the one that was pinned
                (made / target).write_bytes(member.read())
        for file in (PACKAGE / 'inference' / 'web').iterdir():
            shutil.copyfile(file, made / file.name)
        shutil.copytree(PACKAGE / 'samples', made / 'samples', ignore=lambda _, names: [
            n for n in names if not n.endswith('.png')])
        write_json(made / ABOUT_NAME, dict(
            name=name, preprocessing=preprocessing_of(model), temperatures=config.temperatures,
            class_names=config.names_of(model.num_classes),
            exit_macs=config.exit_macs, samples=sorted(file.name for file in (made / 'samples').iterdir()),
            policies=[dict(average_macs=p.expected_macs, accuracy=p.expected_accuracy, exit_shares=p.exit_shares,
                           thresholds=p.thresholds[:-1]) for p in config.policies(BUDGETS).values()]))


def _download(package: Path) -> None:
    """The package of the pinned version, by npm, which knows where its user gets packages from.

    Raises:
        InputError: it cannot be had.
    """
    with written_beside(package) as partial, tempfile.TemporaryDirectory() as scratch:
        try:
            npm = shutil.which('npm')
            if npm is None:
                raise OSError('npm is not installed')
            subprocess.run([npm, 'pack', f'onnxruntime-web@{VERSION}'], cwd=scratch, check=True, capture_output=True)
            shutil.move(next(Path(scratch).glob('*.tgz')), partial)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(error.stderr, errors='replace') if isinstance(error, subprocess.CalledProcessError) else str(
                error)
            reason = (reason.strip().splitlines() or ['no message'])[-1]
            raise InputError(f'onnxruntime-web {VERSION} cannot be downloaded ({reason}): get its package from the npm '
                             'registry and pass it with --onnxruntime-web FILE.tgz') from error
        _check(partial)


def _check(package: Path) -> None:
    """Checks that a file is the pinned package.

    Raises:
        InputError: it is missing, or another.
    """
    data = package.read_bytes() if package.is_file() else b''
    if f'sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}' != INTEGRITY:
        raise InputError(f"'{package}' {'is not' if data else 'is missing; it should be'} the package "
                         f'onnxruntime-web {VERSION}: delete it if it is in the cache folder, else give another '
                         '--onnxruntime-web')
