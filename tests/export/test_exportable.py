"""Whole models exported: segmentors, detectors and classifiers, with preprocessing inside."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_ran, run_tool, the_one_line
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from small import ARCH, images, needs_exporter, seeded, sharpen, small_lavit
from torch import Tensor, nn
from torch.nn import functional as F

from mmlavit.export.agreement import BOXES, LABELS, VALUES
from mmlavit.export.exportable import Exportable, ExportError, build_model
from mmlavit.export.plain import adaptive_average_pool, plain_operators

CONFIGS = ROOT / 'configs'
BACKBONE = dict(
    arch={**ARCH, 'depths': (2, 1, 1, 1), 'vanilla_depths': (1, 1, 1, 1)},
    window_sizes=(4, 6, 6, 3),
)
DIMS = list(ARCH['embed_dims'])
UPERNET = dict(
    backbone=BACKBONE,
    decode_head=dict(in_channels=DIMS, channels=16),
    auxiliary_head=dict(in_channels=DIMS[2], channels=8),
)
SEMFPN = dict(
    backbone=BACKBONE,
    neck=dict(in_channels=DIMS, out_channels=32),
    decode_head=dict(in_channels=[32] * 4, channels=16, num_classes=5),
)
RETINANET = dict(
    backbone=BACKBONE,
    neck=dict(in_channels=DIMS[1:], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1),
)
# Of points, with centerness.
FCOS = dict(
    backbone=BACKBONE,
    neck=RETINANET['neck'],
    bbox_head=dict(
        _delete_=True,
        type='FCOSHead',
        num_classes=3,
        in_channels=32,
        feat_channels=32,
        stacked_convs=1,
        strides=[8, 16, 32],
        norm_cfg=dict(type='GN', num_groups=8),
    ),
    train_cfg=None,
)
CLASSIFIER = dict(backbone=BACKBONE, head=dict(in_channels=DIMS[3]))


def write_config(folder: Path, base: str, model: dict, more: str = '') -> Path:
    """A config of a small model."""
    backbone = dict(model['backbone'], arch=dict(_delete_=True, **model['backbone']['arch']))
    file = folder / f'{base}_small.py'
    file.write_text(
        f'_base_ = {str(CONFIGS / base)!r} + ".py"\n'
        f'model = dict({dict(model, backbone=backbone)})\n{more}'
    )
    return file


@pytest.fixture(autouse=True)
def _scope(own_scope: None) -> None:
    """Building a model sets MMEngine's default scope."""


def make_model(config: Path, checkpoint: Path | None = None, seed: int = 0) -> nn.Module:
    """The toolbox's model of a config, whose every weight is moved, with attention far from even.

    Args:
        config: The config.
        checkpoint: Where its weights go.
        seed: Of the noise.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    parts = dict(cfg.model)
    if cfg.default_scope == 'mmpretrain':
        parts['data_preprocessor'] = cfg.data_preprocessor
    generator = seeded(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS.build(parts).eval()
    outputs = cfg.model.backbone.get('out_indices')
    backbone = small_lavit(**BACKBONE, **({} if outputs is None else {'out_indices': outputs}))
    model.backbone.load_state_dict(sharpen(backbone, images(2, 3, 150, 250)).state_dict())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith('backbone.') or not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            tensor += 0.2 * (noise if name.endswith('_var') else noise - 0.5)
            # The biases of a detector's start make all scores nearly one.
            if name.endswith(('_cls.bias', 'conv_cls.bias')):
                tensor.fill_(-1.0)
        if cfg.default_scope == 'mmseg':
            # So that each class is somewhere the best.
            logits, _ = toolbox_segmentation(model, pixels(2, 3, 70, 100))
            model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    if checkpoint is not None:
        torch.save({'state_dict': model.state_dict()}, checkpoint)
    return model


def pixels(*shape: int, seed: int = 2) -> Tensor:
    """Smooth uint8 images, since on noise all places look alike."""
    batch, channels, height, width = shape
    rough = torch.rand(batch, channels, 4, 5, generator=seeded(seed)) * 255
    return F.interpolate(rough, (height, width), mode='bicubic').clamp(0, 255).byte()


def run(file: Path, x: Tensor) -> dict[str, Tensor]:
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {'image': x.numpy()})
    return {name: torch.from_numpy(y) for name, y in zip(names, found, strict=True)}


def export(config: Path, checkpoint: Path, file: Path, *options: object) -> None:
    """By the command line, recorded at a small size."""
    size = ('--size', 70, 100)
    result = run_tool(
        'export.py', config, checkpoint, '--out', file, *size, *options, cwd=file.parent
    )
    assert_ran(result)
    assert result.stdout.count('differs from PyTorch by') == 5


# ---- What the toolboxes compute ------------------------------------------------------------------


def toolbox_segmentation(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (of a single one: the score) and labels of ``model.test_step``, for uint8 images."""
    from mmseg.structures import SegDataSample

    size = tuple(x.shape[2:])
    samples = [SegDataSample(metainfo=dict(ori_shape=size, img_shape=size)) for _ in x]
    with torch.no_grad():
        found = model.test_step(dict(inputs=list(x), data_samples=samples))
    logits = torch.stack([sample.seg_logits.data for sample in found])
    return logits, torch.cat([sample.pred_sem_seg.data for sample in found])


def toolbox_boxes(model: nn.Module, x: Tensor) -> list[InstanceData]:
    """Every pair of a box and a class as mmdet computes them of uint8 images, none dropped."""
    every = ConfigDict(nms_pre=10**6, score_thr=0.0)  # with -1 it drops one of each level
    with torch.no_grad():
        normalized = model.data_preprocessor(dict(inputs=list(x)))['inputs']
        return model.bbox_head.predict_by_feat(
            *model(normalized),
            batch_img_metas=[dict(img_shape=tuple(x.shape[2:]))] * len(x),
            cfg=every,
            with_nms=False,
        )


def assert_same_boxes(boxes: Tensor, scores: Tensor, expected: InstanceData) -> None:
    """The same boxes with the same scores in every class, in whatever order."""
    count, classes = scores.shape
    assert len(expected.scores) == count * classes
    for label in range(classes):
        of_class = expected.labels == label
        given = torch.cat([expected.bboxes, expected.scores[:, None]], 1)[of_class]
        found = torch.cat([boxes, scores[:, label : label + 1]], 1)
        # By score; then, as boxes outside the image have no area, nothing of them is left to sort.
        given, found = (t[t[:, 4].argsort(descending=True, stable=True)] for t in (given, found))
        torch.testing.assert_close(found[:, 4], given[:, 4], rtol=0, atol=1e-5)
        # Where scores are alike the order is open, so a box may be anywhere among its equals.
        alone = (given[1:, 4] - given[:-1, 4]).abs() > 1e-5
        alone = F.pad(alone, (1, 0), value=True) & F.pad(alone, (0, 1), value=True)
        assert alone.float().mean() > 0.5
        torch.testing.assert_close(found[alone, :4], given[alone, :4], rtol=0, atol=0.01)


@pytest.mark.parametrize('base', ['retinanet_lavit_n_shapes', 'fcos'])
def test_detector_has_the_boxes_of_the_toolbox(tmp_path: Path, base: str) -> None:
    """Padded to 32 pixels, and cut off where the image ends."""
    more = dict(retinanet_lavit_n_shapes=RETINANET, fcos=FCOS)[base]
    if base == 'fcos':
        more = dict(more, type='FCOS')
    config = write_config(tmp_path, 'retinanet_lavit_n_shapes', more)
    reference = make_model(config, tmp_path / 'model.pth')
    model = build_model(config, str(tmp_path / 'model.pth'), head=True, preprocess=True)
    x = pixels(2, 3, 50, 71)
    with torch.no_grad():
        boxes, scores = model(x)
    assert scores.std() > 0.01
    for i, expected in enumerate(toolbox_boxes(reference, x)):
        assert_same_boxes(boxes[i], scores[i], expected)


@pytest.mark.parametrize('pad', [None, 32])
def test_segmentor_has_the_logits_of_the_toolbox(tmp_path: Path, pad: int | None) -> None:
    more = f'data_preprocessor = dict(test_cfg=dict(size_divisor={pad}))\n' if pad else ''
    more += 'model["data_preprocessor"] = data_preprocessor\n' if pad else ''
    config = write_config(tmp_path, 'upernet_lavit_n_shapes', UPERNET, more)
    reference = make_model(config, tmp_path / 'model.pth')
    x = pixels(2, 3, 50, 71)
    expected, best = toolbox_segmentation(reference, x)
    assert expected.shape == (2, 4, 50, 71)
    assert expected.std() > 0.1
    for labels in (False, True):
        model = build_model(
            config, str(tmp_path / 'model.pth'), head=True, preprocess=True, labels=labels
        )
        with torch.no_grad():
            found = model(x)
        if labels:
            assert len(found.unique()) > 1
            assert (found == best).float().mean() > 0.999
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_labels_of_a_single_logit(tmp_path: Path) -> None:
    """A segmentor of one class against the background, by its threshold."""
    head = dict(num_classes=2, out_channels=1, threshold=0.4)
    head['loss_decode'] = dict(use_sigmoid=True, class_weight=None)
    model = dict(UPERNET, decode_head={**UPERNET['decode_head'], **head})
    config = write_config(tmp_path, 'upernet_lavit_n_shapes', model)
    reference = make_model(config, tmp_path / 'model.pth')
    x = pixels(1, 3, 40, 60)
    # Half of the pixels are above it.
    with torch.no_grad():
        middle = toolbox_segmentation(reference, x)[0].median().logit()
        reference.decode_head.conv_seg.bias -= middle - torch.tensor(0.4).logit()
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    exported = build_model(config, str(tmp_path / 'model.pth'), True, preprocess=True, labels=True)
    with torch.no_grad():
        found = exported(x)
    assert 0.4 < found.float().mean() < 0.6
    assert (found == toolbox_segmentation(reference, x)[1]).float().mean() > 0.999


def test_classifier_and_backbone_take_uint8(tmp_path: Path) -> None:
    more = 'data_preprocessor = dict(to_rgb=True, pad_size_divisor=32)\n'
    config = write_config(tmp_path, 'lavit_n_shapes', CLASSIFIER, more)
    reference = make_model(config, tmp_path / 'model.pth')
    x = pixels(2, 3, 50, 71)
    normalized = reference.data_preprocessor(dict(inputs=list(x)))['inputs']
    assert normalized.shape == (2, 3, 64, 96)
    for head in (True, False):
        model = build_model(config, str(tmp_path / 'model.pth'), head, preprocess=True)
        with torch.no_grad():
            found = model(x)
            expected = reference(normalized) if head else reference.backbone(normalized)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # The order of channels is not lost.
        with torch.no_grad():
            other = model(x.flip(1))
        assert not torch.allclose(other[0], found[0], rtol=1e-2, atol=1e-2)


# ---- What ONNX lacks -----------------------------------------------------------------------------


@pytest.mark.parametrize('size', [1, 2, 3, 6, (2, 5), (None, 3)])
def test_pooling_by_products_of_matrices(size: int | tuple) -> None:
    """Of sizes that the bins divide, that they do not, and with more bins than places."""
    rows, cols = size if isinstance(size, tuple) else (size, size)
    for height, width in ((12, 6), (7, 11), (1, 1), (2, 4), (5, 30)):
        x = images(2, 3, height, width)
        expected = F.adaptive_avg_pool2d(x, size)
        torch.testing.assert_close(adaptive_average_pool(x, rows, cols), expected)


def test_plain_operators_compute_the_same_and_go_away(tmp_path: Path) -> None:
    from mmseg.models.utils import Upsample

    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(3), Upsample(scale_factor=2, mode='bilinear', align_corners=False)
    )
    x = images(2, 3, 7, 11)
    expected = model(x)
    with plain_operators(model):
        inside = model(x)
        assert any('forward' in vars(module) for module in model)
    torch.testing.assert_close(inside, expected)
    assert not any('forward' in vars(module) for module in model)


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('base', 'changes', 'options', 'message'),
    [
        ('maskrcnn_lavit_n_shapes', '', {}, 'MaskRCNN .*cannot be exported whole; .* one stage'),
        (
            'upernet_lavit_n_shapes',
            "model = dict(test_cfg=dict(mode='slide', crop_size=(96, 96), stride=(64, 64)))",
            {},
            r"mode = 'slide', .* model\.test_cfg = dict\(mode='whole'\)",
        ),
        (
            'upernet_lavit_n_shapes',
            'model = dict(data_preprocessor=dict(test_cfg=dict(size=(96, 96))))',
            dict(preprocess=True),
            r'test_cfg pads images to \(96, 96\)',
        ),
        (
            'lavit_n_shapes',
            "data_preprocessor = dict(_delete_=True, type='SelfSupDataPreprocessor')",
            dict(preprocess=True),
            'SelfSupDataPreprocessor cannot be part of the file',
        ),
        ('lavit_n_shapes', 'data_preprocessor = None', dict(preprocess=True), 'has no data_prep'),
        ('lavit_n_shapes', '', dict(labels=True), 'whole segmentor'),
        ('upernet_lavit_n_shapes', '', dict(labels=True, head=False), 'whole segmentor'),
    ],
)
def test_refused(tmp_path: Path, base: str, changes: str, options: dict, message: str) -> None:
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = {str(CONFIGS / base)!r} + ".py"\n{changes}\n')
    with pytest.raises(ExportError, match=message) as error:
        build_model(config, **{'head': True, **options})
    assert '\n' not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_backbone_alone_is_not_a_whole_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, 'retinanet_lavit_n_shapes', RETINANET)
    weights = make_model(config).backbone.state_dict()
    torch.save(weights, tmp_path / 'backbone.pth')
    build_model(config, str(tmp_path / 'backbone.pth'))
    with pytest.raises(ExportError, match=r'backbone\.pth does not fit the config'):
        build_model(config, str(tmp_path / 'backbone.pth'), head=True)


@needs_exporter
def test_two_stages_by_the_command_line(tmp_path: Path) -> None:
    config = CONFIGS / 'maskrcnn_lavit_n_shapes.py'
    result = run_tool('export.py', config, '--head', '--out', 'a.onnx', cwd=tmp_path)
    assert result.returncode == 2
    assert 'MaskRCNN' in the_one_line(result.stderr)
    assert not list(tmp_path.iterdir())


class Shifted(Exportable):
    """Adds chance, which a recording takes for a constant: 0.02 to 0.2 to 5000."""

    def compute(self, images: Tensor, height: int, width: int) -> Tensor:
        """As large as the images."""
        return 0 * self.model(images) + 5000 + 0.02 * random.randint(1, 10)


class Edged(Exportable):
    """Has another class in the first column each time."""

    outputs = {'labels': LABELS}

    def compute(self, images: Tensor, height: int, width: int) -> Tensor:
        """As large as the images."""
        labels = (self.model(images)[:, 0] > 0).long()
        return torch.cat([labels[:, :, :1] + random.randrange(1000), labels[:, :, 1:]], 2)


@needs_exporter
def test_boxes_and_labels_have_tolerances_of_their_own(tmp_path: Path) -> None:
    """Where pixels are meant, 4e-5 of the largest is too much."""
    from mmlavit.export.onnx import export_onnx

    model = Shifted(nn.Conv2d(3, 1, 3, 1, 1))
    model.outputs = {'scores': VALUES}
    export_onnx(model, tmp_path / 'a.onnx', (20, 30))
    model.outputs = {'boxes': BOXES}
    with pytest.raises(ExportError, match=r'differ by .* pixels on images .* in boxes; .* 1e-02'):
        export_onnx(model, tmp_path / 'b.onnx', (20, 30))
    with pytest.raises(ExportError, match='differ by .* of all pixels on images .* in labels'):
        export_onnx(Edged(model.model), tmp_path / 'b.onnx', (20, 30))
    assert [file.name for file in tmp_path.iterdir()] == ['a.onnx']


# ---- Files ---------------------------------------------------------------------------------------

SHAPES = [(1, 3, 32, 256), (3, 3, 57, 31), (2, 3, 200, 143)]


@pytest.mark.slow
@needs_exporter
@pytest.mark.parametrize('base', ['upernet_lavit_n_shapes', 'semfpn_lavit_s_ade20k'])
def test_segmentor_of_many_sizes(tmp_path: Path, base: str) -> None:
    parts = dict(upernet_lavit_n_shapes=UPERNET, semfpn_lavit_s_ade20k=SEMFPN)[base]
    config = write_config(tmp_path, base, parts)
    reference = make_model(config, tmp_path / 'model.pth')
    file = tmp_path / 'model.onnx'
    export(config, tmp_path / 'model.pth', file, '--head', '--preprocess')
    for shape in SHAPES:
        x = pixels(*shape)
        expected, _ = toolbox_segmentation(reference, x)
        found = run(file, x)['logits']
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()

    if base == 'upernet_lavit_n_shapes':
        export(config, tmp_path / 'model.pth', file, '--head', '--labels', '--force')
        for shape in SHAPES:
            x = reference.data_preprocessor(dict(inputs=list(pixels(*shape))))['inputs']
            _, expected = toolbox_segmentation(reference, pixels(*shape))
            assert len(expected.unique()) > 1
            assert (run(file, x)['labels'] == expected).float().mean() > 0.999


@pytest.mark.slow
@needs_exporter
@pytest.mark.parametrize('base', ['retinanet_lavit_n_shapes', 'fcos'])
def test_detector_of_many_sizes(tmp_path: Path, base: str) -> None:
    parts = RETINANET if base != 'fcos' else dict(FCOS, type='FCOS')
    config = write_config(tmp_path, 'retinanet_lavit_n_shapes', parts)
    reference = make_model(config, tmp_path / 'model.pth')
    file = tmp_path / 'model.onnx'
    export(config, tmp_path / 'model.pth', file, '--head', '--preprocess')
    for shape in SHAPES:
        x = pixels(*shape)
        found = run(file, x)
        assert found['boxes'].shape[0] == shape[0]
        for i, expected in enumerate(toolbox_boxes(reference, x)):
            assert_same_boxes(found['boxes'][i], found['scores'][i], expected)


@pytest.mark.slow
@needs_exporter
def test_classifier_says_its_classes(tmp_path: Path) -> None:
    """A file of one size, which is quick to make."""
    onnxruntime = pytest.importorskip('onnxruntime')
    config = write_config(tmp_path, 'lavit_n_shapes', CLASSIFIER)
    reference = make_model(config)
    # As a training leaves it.
    meta = dict(dataset_meta=dict(classes=('circle', 'square', 'triangle')))
    torch.save(dict(state_dict=reference.state_dict(), meta=meta), tmp_path / 'model.pth')
    command = ['export.py', config, tmp_path / 'model.pth', '--out', 'a.onnx', '--head']
    command += ['--preprocess', '--fixed', '--size', 50, 71]
    assert_ran(run_tool(*command, cwd=tmp_path))
    x = pixels(1, 3, 50, 71)
    with torch.no_grad():
        expected = reference(reference.data_preprocessor(dict(inputs=list(x)))['inputs'])
    torch.testing.assert_close(
        run(tmp_path / 'a.onnx', x)['scores'], expected, rtol=1e-4, atol=1e-4
    )
    session = onnxruntime.InferenceSession(str(tmp_path / 'a.onnx'))
    said = session.get_modelmeta().custom_metadata_map
    assert said['channels'] == 'BGR'
    assert json.loads(said['classes']) == ['circle', 'square', 'triangle']
