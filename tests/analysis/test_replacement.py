"""What a model computes with its attention replaced, and the tool that measures what that costs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import reference
import torch
from helpers import ROOT, make_shapes, run_tool_here, the_one_line
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from small import ARCH, images, seeded, small_lavit
from torch import Tensor, nn

from mmlavit import LaViT
from mmlavit.analysis.record import recording
from mmlavit.analysis.replacement import HOWS, MAPS, MeanAttention, replaceable, replaced
from mmlavit.analysis.replacement_run import Change, Measured, draw_table, judge, measure
from mmlavit.ops import inference

WINDOWS = (4, 4, 4, 2)
STAGE_OF = [m for m in range(4) for _ in range(ARCH['depths'][m])]
SIZES = [(64, 96), (52, 74)]  # which the windows divide, and do not

Attend = Callable[[dict, Tensor, int, int], Tensor]


# ---- Against the naive reference ----------------------------------------------------------------


def naive_even(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
    """Every token becomes the average of the real tokens of its window."""
    height, width, _ = v.shape
    z = torch.zeros_like(v)
    for win in reference.windows_of(height, width, window):
        tokens = reference.real_tokens(win, height, width, window)
        average = torch.stack([v[token] for token in tokens]).mean(dim=0)
        for token in tokens:
            z[token] = average
    return z


def naive_identity(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
    """Every token stays what it is."""
    return v


def softmaxes(scores: dict, v: Tensor, window: int) -> dict:
    """The attention of a layer (window, head) over real tokens alone, in their order."""
    maps = {}
    for (win, head), a in scores.items():
        tokens = reference.real_tokens(win, *v.shape[:2], window)
        places = [reference.place(token, window) for token in tokens]
        maps[win, head] = a[places][:, places].softmax(dim=-1)
    return maps


def naive(
    batch: Tensor, model: LaViT, attend_of: Callable[[int], Attend], patch: pytest.MonkeyPatch
) -> list[Tensor]:
    """The naive reference with ``attend_of(layer)`` in the place of its softmax and product."""
    layers = []

    def attend(*args: object) -> Tensor:
        layers.append(None)
        return attend_of((len(layers) - 1) % len(STAGE_OF))(*args)

    with patch.context() as context:
        context.setattr(reference, 'attend', attend)
        return reference.lavit(batch, model.state_dict(), ARCH['num_heads'], WINDOWS)


def naive_mean(batch: Tensor, model: LaViT, patch: pytest.MonkeyPatch) -> Callable[[int], Attend]:
    """By layer, what applies the mean of the attention that the images have there."""
    attend = reference.attend
    seen = [[] for _ in STAGE_OF]

    def spy_of(layer: int) -> Attend:
        def spy(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
            seen[layer].append(softmaxes(scores, v, window))
            return attend(scores, v, num_heads, window)

        return spy

    naive(batch, model, spy_of, patch)
    assert all(len(found) == len(batch) for found in seen)

    def mean_of(layer: int) -> Attend:
        def apply(scores: dict, v: Tensor, num_heads: int, window: int) -> Tensor:
            z = torch.zeros_like(v)
            for win, head in scores:
                mean = sum(maps[win, head] for maps in seen[layer]) / len(batch)
                tokens = reference.real_tokens(win, *v.shape[:2], window)
                d = v.shape[-1] // num_heads
                channels = slice(head * d, (head + 1) * d)
                values = torch.stack([v[token][channels] for token in tokens])
                for token, row in zip(tokens, mean @ values, strict=True):
                    z[token][channels] = row
            return z

        return apply

    return mean_of


def mean_over(model: nn.Module, *batches: Tensor) -> MeanAttention:
    mean = MeanAttention()
    with recording(model, mean.see, device=None), torch.no_grad():
        for batch in batches:
            model(batch)
    return mean


@pytest.mark.parametrize('how', MAPS)
@pytest.mark.parametrize(
    'size, stages, grad',
    [
        (SIZES[0], None, False),
        (SIZES[1], None, False),
        (SIZES[1], None, True),
        (SIZES[1], [0, 2], False),
    ],
    ids=str,
)
def test_maps_are_replaced_as_in_the_reference(how, size, stages, grad, monkeypatch):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(3, 3, *size)
    expected_of = {'even': lambda _: naive_even, 'identity': lambda _: naive_identity}
    if how == 'mean':
        expected_of['mean'] = naive_mean(batch, model, monkeypatch)
    # In inference the first stages then run by rows of windows, the last by groups of images.
    monkeypatch.setattr(inference, 'SLAB_TOKENS', 100)
    mean = mean_over(model, batch[:1], batch[1:]) if how == 'mean' else None
    with torch.set_grad_enabled(grad), replaced(model, how, stages=stages, mean=mean):
        found = model(batch)

    plain = reference.attend

    def attend_of(layer: int) -> Attend:
        return expected_of[how](layer) if STAGE_OF[layer] in (stages or range(4)) else plain

    expected = naive(batch, model, attend_of, monkeypatch)
    # The recorded attention that a mean is of is float32.
    tolerance = 1e-4 if how == 'mean' else 1e-9
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_the_mean_over_one_image_is_the_model_as_it_is(size):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    image, other = images(2, 3, *size).split(1)
    with replaced(model, 'mean', mean=mean_over(model, image)):
        found = model(image)
        foreign = model(other)
    for a, b in zip(found, model(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (foreign[-1] - model(other)[-1]).abs().max() > 0.01


@torch.no_grad()
def test_scores_that_are_handed_on_stay():
    """Of the first stage, whose first scores come from what nothing has replaced yet."""
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    with recording(model) as plain:
        model(batch)
    mean = mean_over(model, batch)
    for how in MAPS:
        with replaced(model, how, mean=mean if how == 'mean' else None), recording(model) as found:
            model(batch)
        # The vanilla layer and the less-attention layer made of it alone.
        assert torch.equal(found[0].scores, plain[0].scores)
        assert torch.equal(found[1].scores, plain[1].scores)
        assert torch.equal(found[2].residual, plain[2].residual)
        assert not torch.equal(found[2].scores, plain[2].scores)


# ---- Parts --------------------------------------------------------------------------------------


def images_and_two_models(size: tuple[int, int]) -> tuple[Tensor, LaViT, LaViT]:
    first, second = (small_lavit(scale=0.3, window_sizes=WINDOWS) for _ in range(2))
    return images(2, 3, *size), first, second


@pytest.mark.parametrize('grad', [False, True], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('stages', [None, [2]])
@pytest.mark.parametrize('how', ['ar', 'psi_theta'])
def test_a_part_that_is_off_is_one_of_weights_that_do_nothing(how, stages, grad):
    batch, model, changed = images_and_two_models((52, 74))
    with torch.no_grad():
        for m in range(4) if stages is None else stages:
            for name, weight in changed.stages[m].named_parameters():
                if how == 'ar' and name.endswith('layer_scale'):
                    weight.zero_()
                if how == 'psi_theta' and name.endswith(('psi', 'theta')):
                    weight.copy_(torch.eye(len(weight)))
    with torch.set_grad_enabled(grad):
        plain, expected = model(batch), changed(batch)
        with replaced(model, how, stages=stages):
            found = model(batch)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (found[-1] - plain[-1]).abs().max() > 0.01


def test_only_stages_that_have_a_part_can_lose_it():
    arch = {**ARCH, 'vanilla_depths': (2, 1, 3, 1)}
    model = nn.Sequential(small_lavit(arch=arch, window_sizes=WINDOWS, out_indices=(0, 2)))
    assert replaceable(model, 'even') == [0, 1, 2]
    assert replaceable(model, 'ar') == [1, 2]
    assert replaceable(model, 'psi_theta') == [1]


# ---- The model afterwards -----------------------------------------------------------------------


def state_of(model: nn.Module) -> list:
    """All that belongs to a model, by identity."""
    found = []
    for name, module in model.named_modules():
        found += [(name, key, id(value)) for key, value in vars(module).items()]
        for kind in (module._parameters, module._modules, module._forward_pre_hooks):
            found += [(name, key, id(value)) for key, value in kind.items()]
    return found


@pytest.mark.parametrize('fails', [False, True], ids=['', 'after an error'])
@pytest.mark.parametrize('how', [*MAPS, 'ar', 'psi_theta'])
def test_the_model_is_as_it_was_afterwards(how, fails):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    mean = mean_over(model, batch) if how == 'mean' else None
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(batch)
        if fails:
            with (
                pytest.raises(ValueError, match='x must have shape'),
                replaced(model, how, mean=mean),
            ):
                model(batch)
                model(batch[0])
        else:
            with replaced(model, how, mean=mean):
                inside = model(batch)
            assert not torch.equal(inside[-1], plain[-1])
        again = model(batch)
    assert state_of(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@torch.no_grad()
def test_one_replacement_inside_another():
    model = small_lavit(scale=0.3, window_sizes=WINDOWS)
    batch = images(2, 3, 52, 74)
    before = state_of(model)
    with replaced(model, 'even'):
        even = model(batch)
        with replaced(model, 'identity'):
            inner = model(batch)
        again = model(batch)
    with replaced(model, 'identity'):
        identity = model(batch)
    assert torch.equal(even[-1], again[-1])
    assert torch.equal(inner[-1], identity[-1])
    assert state_of(model) == before


@pytest.mark.parametrize('how', MAPS)
def test_gradients_come_through_all_that_is_left(how):
    model = small_lavit(scale=0.3, window_sizes=WINDOWS).train()
    batch = images(2, 3, 52, 74)
    mean = mean_over(model, batch) if how == 'mean' else None
    with replaced(model, how, mean=mean):
        sum(out.square().mean() for out in model(batch)).backward()
    for name, weight in model.named_parameters():
        if name.endswith(('.proj.weight', '.v.weight', '.fc1.weight')):
            assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name
        if name.endswith(('psi', 'theta')):
            assert weight.grad is None


@torch.no_grad()
# ---- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'model, how, options, error, message',
    [
        (small_lavit, 'odd', {}, ValueError, "how must be one of .*'psi_theta'.*, got 'odd'"),
        (lambda: nn.Linear(2, 2), 'even', {}, ValueError, 'must hold a LaViT, Linear holds none'),
        (small_lavit, 'even', {'stages': [4]}, ValueError, r'some of 0\.\.3, got \[4\]'),
        (small_lavit, 'even', {'stages': 1}, TypeError, 'sequence of integers, got 1'),
        (small_lavit, 'ar', {'stages': [0, 1]}, ValueError, r"how='ar' replaces, \[0\] have not"),
        (lambda: small_lavit(out_indices=(0,)), 'ar', {}, ValueError, 'all of the LaViT have not'),
        (small_lavit, 'mean', {}, ValueError, "mean must be a MeanAttention .* None for 'mean'"),
        (small_lavit, 'even', {'mean': MeanAttention()}, ValueError, 'None for any other'),
        (small_lavit, 'mean', {'mean': MeanAttention()}, ValueError, r'not seen stages\.0\.blocks'),
    ],
)
def test_says_what_cannot_be_replaced(model, how, options, error, message):
    model = model()
    before = state_of(model)
    with pytest.raises(error, match=message), replaced(model, how, **options):
        pass
    assert state_of(model) == before


@torch.no_grad()
def test_a_mean_is_of_images_of_one_size():
    model = small_lavit(window_sizes=WINDOWS)
    mean = mean_over(model, images(1, 3, 52, 74))
    sizes = '13 x 19 .* 13 x 20'
    with pytest.raises(ValueError, match=sizes), replaced(model, 'mean', mean=mean):
        model(images(1, 3, 52, 80))
    assert mean.refusal is None
    with recording(model, mean.see):
        model(images(1, 3, 52, 80))
    assert mean.refusal is not None
    with pytest.raises(ValueError, match=sizes), replaced(model, 'mean', mean=mean):
        pass


# ---- The tool -----------------------------------------------------------------------------------

run = partial(run_tool_here, 'analysis/replacement.py')
NANO = dict(arch='nano', window_sizes=(8, 12, 6, 3), out_indices=(3,))
IMAGES = 12


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set, configs, and a classifier that names all of its images."""
    folder = tmp_path_factory.mktemp('project')
    (folder / 'data').mkdir()
    make_shapes(folder / 'data' / 'shapes', 3, IMAGES)
    loader = 'val_dataloader = dict(batch_size=5, num_workers=0, persistent_workers=False)\n'
    for name in ('lavit', 'upernet_lavit'):
        base = ROOT / 'configs' / f'{name}_n_shapes.py'
        (folder / f'{name}.py').write_text(f'_base_ = {str(base)!r}\n{loader}')
    backbone = nano()
    features = torch.stack([features_of(backbone, image) for image, _ in pictures(folder)])
    labels = torch.tensor([label for _, label in pictures(folder)])
    # Of more features than images a linear layer can make anything.
    weight = torch.linalg.lstsq(features, torch.eye(3)[labels], driver='gelsd').solution.T
    weights = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    weights |= {'head.fc.weight': weight, 'head.fc.bias': torch.zeros(3)}
    torch.save(dict(state_dict=weights, meta={}), folder / 'trained.pth')
    return folder


def nano() -> LaViT:
    """A backbone whose every part has something to say."""
    generator = seeded(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LaViT(**NANO).eval()
    for name, weight in model.named_parameters():
        if '.attn.' in name:
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
        if name.endswith('layer_scale'):
            weight.data.fill_(3.0)
    return model


def pictures(folder: Path) -> list[tuple[Tensor, int]]:
    """The validation images, normalized as ImageNet's are, and their labels; by other means."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    found = []
    for label, shape in enumerate(('circle', 'square', 'triangle')):
        for file in sorted((folder / 'data/shapes/imagenet/val' / shape).iterdir()):
            pixels = cv2.imread(str(file))[..., ::-1]
            image = ((pixels - mean) / std).transpose(2, 0, 1)
            found.append((torch.from_numpy(image).float()[None], label))
    assert len(found) == IMAGES
    return found


@torch.no_grad()
def features_of(model: LaViT, image: Tensor) -> Tensor:
    return model(image)[0].mean(dim=(0, 2, 3))


def cells_of(markdown: str) -> list[list[str]]:
    """The tables in a text, row by row, without the lines below heads."""
    rows = [line.strip('| ').split(' | ') for line in markdown.splitlines() if line[:1] == '|']
    return [row for row in rows if row[0] != '---']


def test_a_classifier_loses_what_it_loses_by_other_means(project, monkeypatch, capsys):
    (project / 'found.json').write_text('old')
    args = ['--images', 7, '--out', 'found.json', '--force']
    run(monkeypatch, project, 'lavit.py', 'trained.pth', *args)
    found = json.loads((project / 'found.json').read_text())
    assert found['images'] == 7
    assert found['as_it_is'] == {'accuracy/top1': 100}

    chosen = [pictures(project)[i * IMAGES // 7] for i in range(7)]
    weight = torch.load(project / 'trained.pth')['state_dict']['head.fc.weight']
    model = nano()
    mean = mean_over(model, *(image for image, _ in chosen))
    expected = {}
    for how in HOWS:
        for m in [None, *replaceable(model, how)]:
            stages, given = None if m is None else [m], mean if how == 'mean' else None
            with replaced(model, how, stages=stages, mean=given):
                named = [(weight @ features_of(model, x)).argmax().item() for x, _ in chosen]
            expected[how, m] = [n == label for n, (_, label) in zip(named, chosen, strict=True)]
    assert len(expected) == 24 and len({tuple(hits) for hits in expected.values()}) >= 5
    assert not all(expected['psi_theta', None]) and not all(expected['ar', None])

    changes = {(c['how'], c['stage'] and c['stage'] - 1): c for c in found['changes']}
    assert changes.keys() == expected.keys()
    for key, hits in expected.items():
        assert changes[key]['points']['accuracy/top1'] == pytest.approx(
            100 * np.mean(hits) - 100, abs=1e-3
        )
        # All of them were right before.
        error = 100 * np.std(hits, ddof=1) / math.sqrt(7)
        assert changes[key]['errors']['accuracy/top1'] == pytest.approx(error, abs=1e-6)

    head, *rows = cells_of(capsys.readouterr().out)
    assert len(head) == 1 + len(HOWS)
    for stage, row in zip((None, 0, 1, 2, 3), rows, strict=True):
        for how, cell in zip(HOWS, row[1:], strict=True):
            if (how, stage) not in changes:
                assert (how, stage) == ('ar', 0) and not re.search(r'\d', cell)
                continue
            points, error = map(float, cell.split(' ± '))
            change = changes[how, stage]
            assert points == pytest.approx(change['points']['accuracy/top1'], abs=0.0501)
            assert error == pytest.approx(change['errors']['accuracy/top1'], abs=0.0501)


def weights_of(config: Path, folder: Path) -> str:
    """A checkpoint of the model of a config: LayerScale is 0, attention far from even."""
    from mmlavit.analysis.loading import build_model

    generator = seeded(5)
    with DefaultScope.overwrite_default_scope('mmengine'), torch.random.fork_rng():
        torch.manual_seed(5)
        model, _ = build_model(config)
    for name, weight in model.named_parameters():
        if name.endswith('layer_scale'):
            weight.data.zero_()
        if name.endswith('qkv.weight'):
            weight.data += torch.randn(weight.shape, generator=generator)
    torch.save(model.state_dict(), folder / 'start.pth')
    return 'start.pth'


def test_parts_that_do_nothing_cost_a_segmentor_nothing(project, monkeypatch, capsys):
    """LayerScale is 0 and Psi and Theta are the identity, but attention is there."""
    weights = weights_of(project / 'upernet_lavit.py', project)
    only = ['--only', 'even', 'ar', 'psi_theta']
    run(monkeypatch, project, 'upernet_lavit.py', weights, *only, '--out', 'seg.json')
    found = json.loads((project / 'seg.json').read_text())
    assert found['as_it_is'].keys() == {'mIoU'} and found['images'] == IMAGES
    points = {(c['how'], c['stage']): c['points']['mIoU'] for c in found['changes']}
    assert not any(c['errors'] for c in found['changes'])
    assert all(abs(p) < 1e-6 for (how, _), p in points.items() if how != 'even')
    assert len(points) == 5 + 4 + 5
    assert abs(points['even', None]) > 0.1
    (sentence,) = [s for s in found['sentences']['mIoU'] if 'Psi' in s]
    assert all(place in sentence for place in ('all stages', 'stage 1', 'stage 4'))
    assert sentence in capsys.readouterr().out


@MODELS.register_module(force=True)
class Oracle(BaseModel):
    """Finds all boxes of an image as long as its maps are those of the first time it sees it."""

    def __init__(self, backbone: dict, data_preprocessor: dict) -> None:
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.seen: dict[int, Tensor] = {}

    def forward(self, inputs: Tensor, data_samples: Sequence, mode: str) -> Sequence:
        for sample, features in zip(data_samples, self.backbone(inputs)[0], strict=True):
            known = torch.equal(self.seen.setdefault(sample.img_id, features), features)
            boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
            sample.pred_instances = InstanceData(
                bboxes=boxes if known else boxes[:0],
                labels=labels if known else labels[:0],
                scores=torch.ones(len(boxes) if known else 0),
            )
        return data_samples


def test_some_images_of_a_detector_are_judged_by_their_own_boxes(project, monkeypatch):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    pipeline.append(dict(type='PackDetInputs'))
    model = dict(_delete_=True, type='Oracle', backbone=dict(type='LaViT', **NANO))
    loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
    loader['dataset'] = dict(pipeline=pipeline)
    (project / 'oracle.py').write_text(
        f'_base_ = {str(ROOT / "configs" / "maskrcnn_lavit_n_shapes.py")!r}\n'
        f'model = {dict(model, data_preprocessor=dict(type="DetDataPreprocessor"))}\n'
        f'val_dataloader = {loader}\n'
        "val_evaluator = dict(metric='bbox')\n"
    )
    weights = {f'backbone.{name}': value for name, value in nano().state_dict().items()}
    torch.save(weights, project / 'oracle.pth')
    args = ['--only', 'even', '--images', 5, '--out', 'det.json']
    run(monkeypatch, project, 'oracle.py', 'oracle.pth', *args)
    found = json.loads((project / 'det.json').read_text())
    # The other images have boxes, too, which nobody was asked for.
    assert found['as_it_is'] == {'coco/bbox_mAP': 100}
    assert [c['points'] for c in found['changes']] == [{'coco/bbox_mAP': -100}] * 5


def test_images_of_different_sizes_have_no_mean(project, monkeypatch, capsys):
    root = project / 'sizes'
    for i, (width, shape) in enumerate(((64, 'circle'), (64, 'square'), (96, 'triangle'))):
        (root / shape).mkdir(parents=True)
        cv2.imwrite(str(root / shape / 'x.png'), np.full((64, width, 3), 40 * i, dtype=np.uint8))
    loader = dict(batch_size=1, dataset=dict(data_root=str(root), data_prefix=''))
    (project / 'sizes.py').write_text(f"_base_ = 'lavit.py'\nval_dataloader = {loader}\n")
    run(monkeypatch, project, 'sizes.py', 'trained.pth', '--only', 'mean', 'even')
    out = capsys.readouterr().out
    assert len(cells_of(out)[0]) == 2
    assert '16 x 16 and of 16 x 24 tokens' in out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['no.py', 'trained.pth'], 'config file not found: no.py'),
        (['lavit.py', 'no.pth'], 'no.pth can not be found.'),
        (['lavit.py', 'backbone.pth'], 'backbone.pth does not fit lavit.py'),
        (['resnet.py', 'trained.pth'], 'model must hold a LaViT, ImageClassifier holds none'),
        (['unjudged.py', 'trained.pth'], 'has no val_dataloader and no test_dataloader'),
        (['nodata.py', 'trained.pth'], 'no/where'),
        (['typo.py', 'trained.pth'], 'Accurasy is not in the mmpretrain::metric registry'),
        (['lavit.py', 'trained.pth', '--metric', 'mIoU'], "gives no 'mIoU' for --metric"),
        (['lavit.py', 'trained.pth', '--out', 'lavit.py'], 'lavit.py is there already'),
        (['lavit.py', 'trained.pth', '--out', 'no/x.json'], 'no is no folder'),
    ],
    ids=lambda value: '' if isinstance(value, str) else ' '.join(value),
)
def test_says_in_a_line_what_is_wrong(args, message, project, monkeypatch, capsys):
    base = "_base_ = 'lavit.py'\n"
    extra = {
        'resnet.py': "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18))",
        'unjudged.py': 'val_dataloader = test_dataloader = None',
        'nodata.py': "val_dataloader = dict(dataset=dict(data_root='no/where'))",
        'typo.py': "val_evaluator = dict(type='Accurasy')",
    }
    for name, text in extra.items():
        (project / name).write_text(f'{base}{text}\n')
    torch.save(nano().state_dict(), project / 'backbone.pth')
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, project, *args, '--images', 2, '--only', 'ar')
    assert stop.value.code == 2
    err = capsys.readouterr().err
    # With an unknown metric the model has run once.
    line = the_one_line(err[err.index('mmlavit: ') :] if '--metric' in args else err)
    assert line.startswith('mmlavit: ') and message in line


@pytest.mark.parametrize(
    'option, value, message',
    [
        ('--images', '0', 'must be at least 1, got 0'),
        ('--threshold', '-1', 'must be at least 0, got -1'),
        ('--threshold', 'nan', 'must be at least 0, got nan'),
        ('--only', 'odd', "invalid choice: 'odd'"),
    ],
)
def test_refuses_a_command_line_that_is_wrong(option, value, message, project, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, project, 'lavit.py', 'trained.pth', option, value)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f'argument {option}: ' in err and message in err


@pytest.mark.parametrize(
    'options, message',
    [({'images': 0}, 'images must be at least 1, got 0'), ({'only': ['odd']}, "got 'odd'")],
)
def test_measures_only_what_can_be(options, message, project, monkeypatch):
    monkeypatch.chdir(project)
    with (
        DefaultScope.overwrite_default_scope('mmengine'),
        pytest.raises(ValueError, match=message),
    ):
        measure('lavit.py', 'trained.pth', **options)


# ---- What is said of the numbers ----------------------------------------------------------------


def made_up(*changes: Change, value: float = 50.0) -> Measured:
    return Measured('c.py', 'w.pth', 100, 4, {'mIoU': value}, list(changes), [])


def change(points: float, error: float | None = None, stage: int | None = 2) -> Change:
    return Change('even', stage, {'mIoU': points}, {} if error is None else {'mIoU': error})


def test_parts_are_told_apart_by_what_they_cost():
    def said(*changes: Change) -> str:
        (sentence,) = judge(made_up(*changes), 'mIoU', threshold=0.5)
        return sentence

    for points in (-0.4, 0.4):
        assert 'stage 3' in said(change(points), change(-5.0, stage=1))
        assert 'stage 2' not in said(change(points), change(-5.0, stage=1))
    # Nothing, and too few images to be sure that it is nothing.
    sure, unsure = (said(change(-0.4, 0.1), change(-0.4, e, stage=1)) for e in (0.1, 0.3))
    assert unsure.replace('0.3', '0.1') != sure
    assert said(change(0.6)).startswith('WARNING') and 'stage 3' in said(change(0.6))
    assert said(change(-0.6, 0.2)) == said(change(-9.0, 0.2))
    # Less than two standard errors, for better or worse.
    assert 'stage 3' in said(change(-0.6, 0.4))
    assert 'stage 3' in said(change(0.6, 0.4)) and 'WARNING' not in said(change(0.6, 0.4))
    kinds = judge(made_up(change(0.0), change(0.6), change(-0.6, 0.4)), 'mIoU', threshold=0.5)
    assert len(set(kinds)) == 3


def test_a_model_that_has_nothing_to_lose_is_no_evidence():
    (sentence,) = judge(made_up(change(0.0), value=0.0), 'mIoU', threshold=0.5)
    assert sentence.startswith('WARNING') and 'stage 3' not in sentence


def test_a_table_has_no_negative_nothing():
    measured = made_up(change(-0.01), change(-12.34, stage=None))
    rows = cells_of(draw_table(measured, 'mIoU'))
    assert [row[1] for row in rows[1:]] == ['-12.3', '–', '–', '+0.0', '–']
