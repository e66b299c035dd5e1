"""Options: every choice trains, numbers out of range and configs of the wrong kind end in one line."""
import pytest
import torch
import yaml

from timm_multiexit.errors import InputError
from timm_multiexit.training.options import build_parser, parse_train_args
from timm_multiexit.training.trainer import Trainer

pytest_plugins = ['training_support']  # folder_dataset
pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = ['--model-kwargs', 'steps=(1,1,1)', 'base_width=4', 'growth=2', 'head_width=4', '--num-classes', '2',
         '--batch-size', '100', '--validation-images', '100', '--epochs', '4', '--threads', '1', '--device', 'cpu']
# What makes a choice effective.
WITH = {
    'sched': ['--decay-epochs', '1', '--decay-milestones', '2'],
    'mixup_mode': ['--mixup', '0.2', '--cutmix', '0.5'],
    'amp_dtype': ['--amp'],
    'loader': ['--workers', '0'],
    'kd_exits': ['--kd-model-name', 'msfuse_cifar', '--kd-checkpoint', 'FILE', '--kd-model-kwargs', *SMALL[1:5]],
}
# --regime is for exits on a backbone: see test_regimes.py.
CHOICES = [(action.dest, choice) for action in build_parser('')._actions for choice in action.choices or ()
           if action.dest != 'regime']


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    import timm
    from safetensors.torch import save_file
    path = tmp_path_factory.mktemp('teacher') / 'teacher.safetensors'
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', num_classes=2, steps=(1, 1, 1), base_width=4, growth=2, head_width=4)
    save_file(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize('name, choice', CHOICES)
def test_every_choice_trains(name, choice, folder_dataset, teacher):
    extra = [teacher if value == 'FILE' else value for value in WITH.get(name, [])]
    data = ['--data-dir', str(folder_dataset), '--dataset', 'folder']
    args = parse_train_args('', [*SMALL, *data, '--' + name.replace('_', '-'), choice, *extra])
    trainer = Trainer(args)
    before = [p.clone() for p in trainer.task.parameters()]
    rates = [trainer.optimizer.param_groups[0]['lr']]
    for epoch in range(2):  # three steps each
        metrics = trainer.train_epoch(epoch)
        rates.append(trainer.optimizer.param_groups[0]['lr'])
    assert 0 < metrics['loss'] < 10
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.task.parameters()))
    assert all(p.isfinite().all() for p in trainer.task.parameters())
    if name == 'sched':
        trainer.scheduler.step_update(args.epochs * trainer.updates_per_epoch - 1)
        last = trainer.optimizer.param_groups[0]['lr']
        assert rates[0] < rates[1] and (last < rates[1]) == (choice != 'constant')


def test_a_batch_of_one_image_is_mixed_with_itself(folder_dataset):
    args = parse_train_args('', [*SMALL, '--data-dir', str(folder_dataset), '--dataset', 'folder', '--mixup', '0.2'])
    image = torch.randn(1, 3, 32, 32)
    images, targets = Trainer(args).prepare(image, torch.tensor([1]))
    torch.testing.assert_close(images, image.expand(2, -1, -1, -1))
    assert targets.shape == (2, 2) and (targets.argmax(1) == 1).all()


BAD = """
--epochs -1 | --epochs 1.5 | --epochs two | --batch-size 0 | --batch-size -4 | --batch-size 1 --mixup 0.2
--lr nan | --lr -1 | --lr inf | --momentum 1 | --weight-decay -1 | --warmup-epochs -1 | --epochs 2 --warmup-epochs 3
--clip-grad 0 | --clip-grad -1 | --clip-grad nan | --model-ema-decay 2 | --model-ema-decay 1 | --smoothing 2
--smoothing -1 | --drop 1.5 | --drop -1 | --reprob 2 | --recount 0 | --mixup -1 | --mixup-prob 5 | --threads 100000
--threads -1 | --seed -1 | --seed 100000000000 | --log-interval 0 | --eval-interval 0 | --checkpoint-interval 0
--checkpoint-hist 0 | --validation-images -1 | --num-classes 1 | --num-classes 0 | --exit-weights nan 1 1
--exit-weights inf 1 | --kd-temperature 0 | --distill-temperature 0 | --distill-weight -1 | --crop-padding -1
--workers -1 | --mixup-off-epoch -1 | --sched foo | --sched none | --sched plateau | --sched step
--sched multistep | --device foo | --device cuda:99 | --experiment ../x | --experiment /x | --model-kwargs foo
--config /nope | --config /tmp | --nope | --task-loss-weight 2 | --decay-rate 0 | --warmup-lr -1 | --loader Memory
--backbone-epochs 3 | --cuda-graph --amp --amp-dtype float16
"""


@pytest.mark.parametrize('line', [line.strip() for row in BAD.strip().splitlines() for line in row.split('|')])
def test_bad_values_end_in_one_line(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train_args('', line.split())
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count('\n') == 1 and 'error: ' in message
    assert line.split()[0] in message or line.split()[-2] in message or line.split()[-1] in message


@pytest.mark.parametrize('text', [
    '- a\n- b\n', '1: 2\n', 'foo: 1\n', b'\xff\xfe\x00', '{', 'hello', 'loader: Memory\n', 'amp_dtype: fp16\n',
    'model_ema_warmup: "false"\n', 'lr: [1, 2]\n', 'lr: {a: 1}\n', 'mixup_mode: foo\n', 'log_interval: 2.5\n',
    'clip_grad: true\n', 'clip_grad: -1\n', 'lr: fast\n', 'exit_weights: [a]\n', '[' * 5000, 'amp: 1\n',
    '!!python/object/apply:os.system ["false"]\n', 'a: &a [*a]\n', 'model_kwargs: x\n'])
def test_bad_configs_end_in_one_line(text, tmp_path, capsys):
    path = tmp_path / 'bad.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stopped:
        parse_train_args('', ['--config', str(path)])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count('\n') == 1 and 'error: ' in message


def test_a_config_sets_defaults_that_the_command_line_overrides(tmp_path):
    settings = dict(
        lr=1e-5, amp=True, model_ema=False, exit_weights=[1, 2.5], aa='', clip_grad=None, freeze=[], seed=0,
        model_kwargs=dict(steps=(1, 2), name='x y', flag=False), kd_model_name='resnet18', epochs=7)
    path = tmp_path / 'good.yaml'
    path.write_text(yaml.safe_dump({**settings, 'model_kwargs': {**settings['model_kwargs'], 'steps': [1, 2]}}))
    args = parse_train_args('', ['--config', str(path), '--epochs', '3', '--exit-weights', '1'])
    assert (args.lr, args.amp, args.model_ema, args.exit_weights, args.aa) == (1e-5, True, False, [1.], None)
    assert (args.clip_grad, args.freeze, args.seed, args.epochs) == (None, [], 0, 3)
    assert args.model_kwargs == dict(steps=[1, 2], name='x y', flag=False) and args.kd_model_name == ['resnet18']
    assert parse_train_args('', ['--config', str(path), '--no-amp']).amp is False


@pytest.mark.parametrize('extra', [
    ['--opt', 'foo'], ['--opt-kwargs', 'foo=1'], ['--model', 'msfuse_cifra'], ['--model', ''],
    ['--model', 'msfuse_cifar.nope'], ['--model-kwargs', 'foo=1'], ['--model-kwargs', 'steps=5'],
    ['--crop-padding', '40'], ['--crop-padding', '32'], ['--sched', 'wsd', '--decay-epochs', '50'],
    ['--kd-model-name', 'nope'], ['--initial-checkpoint', '/nope'], ['--initial-checkpoint', '/tmp'],
    ['--exit-weights', '1', '1'], ['--freeze', 'nope'], ['--batch-size', '1000'], ['--validation-images', '400000']])
def test_what_does_not_fit_is_an_input_error(extra, folder_dataset):
    with pytest.raises(InputError) as raised:
        Trainer(parse_train_args('', [*SMALL, '--data-dir', str(folder_dataset), '--dataset', 'folder', *extra]))
    assert '\n' not in str(raised.value)
