"""The loss of all exits against its definition, with teachers and frozen modules."""
import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_multiexit.errors import InputError
from timm_multiexit.pretrained.load import load_teacher
from timm_multiexit.training.task import MultiExitTask


def small_network(**kwargs):
    torch.manual_seed(3)
    kwargs = {'num_classes': 2, 'steps': (1, 1, 1), 'base_width': 8, 'growth': 4, 'head_width': 16, **kwargs}
    return timm.create_model('msfuse_cifar', **kwargs)


def test_distillation_into_all_exits():
    """Against the definition, computed here from the logits of student and teacher."""
    student, teacher = small_network(), small_network(growth=6)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (0.4, 0.4, 0.4), 'std': (0.3, 0.3, 0.3)}
    task = MultiExitTask(student, [1., 2., 3.], teacher=teacher, task_loss_weight=0.25, kd_temperature=3.).train()
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(2, (8,))
    own = [torch.tensor(student.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std')]
    with torch.no_grad():
        logits = teacher.forward_exits((images * own[1] + own[0] - 0.4) / 0.3)
        target = torch.stack([(x / 3).softmax(1) for x in logits]).mean(0)
        expected = 0.
        for share, x in zip((1 / 6, 2 / 6, 3 / 6), student(images)):
            kl = (target * (target.log() - (x / 3).log_softmax(1))).sum(1).mean()
            expected += share * (0.25 * torch.nn.functional.cross_entropy(x, targets) + 0.75 * 9 * kl)
    loss = task(images, targets)['loss']
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    # Checkpoints hold the student only.
    assert task.get_checkpoint_state()['state_dict'].keys() == student.state_dict().keys()



def test_a_teacher_of_another_image_size_is_refused(tmp_path):
    shape = dict(depth=1, embed_dim=32, num_heads=2)
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=2, **shape)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    arguments = ('vit_tiny_patch16_224', str(tmp_path / 'vit.safetensors'), 2, shape)
    assert load_teacher(*arguments, (3, 224, 224)).num_classes == 2
    with pytest.raises(InputError, match='does not take images of 3 x 32 x 32 .*choose another, or --input-size'):
        load_teacher(*arguments, (3, 32, 32))


def test_a_teacher_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / 'teacher.safetensors'
    save_file(timm.create_model('resnet10t', num_classes=2).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="the teacher 'resnet10t' cannot be loaded .*: choose one of") as caught:
        load_teacher('resnet10t', str(path), 2, {}, (3, 32, 32))
    assert '\n' not in str(caught.value)


def test_several_teachers_are_averaged():
    """Two teachers, one of them with a single classifier, against the mean of their probabilities."""
    student, several = small_network(), small_network(growth=6)
    single = timm.create_model('resnet10t', num_classes=2)
    task = MultiExitTask(student, teacher=[several, single], task_loss_weight=0., kd_temperature=2.).train()
    assert student.training and not several.training and not single.training
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(2, (8,))
    own, other = ([torch.tensor(cfg[k]).view(3, 1, 1) for k in ('mean', 'std')]
                  for cfg in (student.pretrained_cfg, single.pretrained_cfg))
    with torch.no_grad():
        first = torch.stack([(x / 2).softmax(1) for x in several.forward_exits(images)]).mean(0)
        second = (single((images * own[1] + own[0] - other[0]) / other[1]) / 2).softmax(1)
        target = (first + second) / 2
        kl = [(target * (target.log() - (x / 2).log_softmax(1))).sum(1).mean() for x in student(images)]
    torch.testing.assert_close(task(images, targets)['loss'], 4 * sum(kl) / 3)


def test_one_teacher_is_drawn_per_batch():
    """Each loss is that of one teacher's last exit, and over several steps both are used."""
    student, teachers = small_network(), [small_network(growth=6), small_network(growth=8)]
    task = MultiExitTask(student, teacher=teachers, task_loss_weight=0., kd_exits='last', kd_draw=True).train()
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(2, (8,))
    with torch.no_grad():
        logits = [x / 2 for x in student(images)]
        expected = []
        for teacher in teachers:
            target = (teacher(images) / 2).softmax(1)
            kl = [(target * (target.log() - x.log_softmax(1))).sum(1).mean() for x in logits]
            expected.append((4 * sum(kl) / 3).item())
        found = [task(images, targets)['loss'].item() for _ in range(12)]
    nearest = [min((0, 1), key=lambda k: abs(expected[k] - loss)) for loss in found]
    assert set(nearest) == {0, 1}
    assert found == pytest.approx([expected[k] for k in nearest], rel=1e-4)
    with pytest.raises(InputError, match='choose one of mean, last'):
        MultiExitTask(student, kd_exits='first')


def test_frozen_modules_do_not_change():
    student = small_network()
    task = MultiExitTask(student, frozen=['stages.0.layers.0.conv1', 'stages.0.layers.0.conv4']).train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    task(torch.randn(8, 3, 32, 32), torch.randint(2, (8,)))['loss'].backward()
    optimizer.step()
    same = {k for k, v in student.state_dict().items() if torch.equal(v, before[k])}
    assert same == {k for k in before if k.startswith(('stages.0.layers.0.conv1.', 'stages.0.layers.0.conv4.'))}
    with pytest.raises(InputError, match="cannot freeze 'stem'"):
        MultiExitTask(student, frozen=['stem'])


def test_any_timm_network_can_be_the_teacher():
    teacher = timm.create_model('resnet10t', num_classes=2)
    task = MultiExitTask(small_network(), teacher=teacher).train()
    assert torch.isfinite(task(torch.randn(4, 3, 32, 32), torch.randint(2, (4,)))['loss'])
    with pytest.raises(InputError, match='the teacher has 2 classes and the network 5'):
        MultiExitTask(small_network(num_classes=5), teacher=teacher)
    with pytest.raises(InputError, match='share, from 0 to 1'):
        MultiExitTask(small_network(), teacher=teacher, task_loss_weight=1.5)
