"""What RoIAlign reads from our maps is what they hold, whatever layout the images came in.

``mmcv.ops.RoIAlign`` takes the memory of its input as NCHW and is silently wrong on any other
layout (open-mmlab/mmcv#2203); convolutions such as those of FPN pass layouts on. So the maps must
be NCHW-contiguous, and here FPN and RoIAlign on them are held against float64 and explicit loops.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from mmcv.ops import roi_align
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

from mmlavit import LaViT

DIMS = (32, 64, 160, 320)
STRIDES = (4, 8, 16, 32)
CHANNELS = 8
BINS = 3
FINEST_SCALE = 8  # boxes of 16, 32 and 64 pixels then begin the second, third and fourth level


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images of the shape of ``x`` in every way that they may lie in memory."""
    n, c, h, w = x.shape
    frame = torch.randn(n, c + 2, 2 * h + 3, w + 5)
    return {
        'contiguous': x.contiguous(),
        'channels_last': x.contiguous(memory_format=torch.channels_last),
        'NHWC array, permuted': x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        'columns first': x.transpose(2, 3).contiguous().transpose(2, 3),
        'batch last': x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        'sliced': frame[:, 1 : c + 1, 1 : 2 * h + 1 : 2, 2 : w + 2],
        'one image for all': x[:1].expand(n, c, h, w),
        'grey': x[:, :1].expand(n, c, h, w),
    }


def seed(number: int) -> None:
    print(f'seed {number}')
    torch.manual_seed(number)


LAYOUTS = list(layouts(torch.zeros(2, 3, 4, 4)))


def boxes(batch: int, height: int, width: int) -> torch.Tensor:
    """Boxes (image, x1, y1, x2, y2) of all scales in every image, some partly outside."""
    rows = [
        (image, x * width, y * height, x * width + side, y * height + side * aspect)
        for image in range(batch)
        for side, (x, y), aspect in zip(
            (5.3, 14.1, 20.7, 40.2, 90.9),
            ((0.12, 0.31), (0.62, 0.85), (0.33, 0.08), (-0.1, 0.2), (0.05, -0.2)),
            (1.0, 0.8, 1.3, 1.0, 0.9),
            strict=True,
        )
    ]
    return torch.tensor(rows, dtype=torch.float64)


def naive_roi_align(feature: np.ndarray, box: np.ndarray, scale: float) -> np.ndarray:
    """RoIAlign of one box on one map (C, H, W), with ``aligned=True`` and 2 x 2 samples a bin."""
    _, height, width = feature.shape
    x1, y1, x2, y2 = box * scale - 0.5
    out = np.zeros((feature.shape[0], BINS, BINS))
    for row, column in np.ndindex(BINS, BINS):
        for i, j in np.ndindex(2, 2):
            y = y1 + (row + (i + 0.5) / 2) * (y2 - y1) / BINS
            x = x1 + (column + (j + 0.5) / 2) * (x2 - x1) / BINS
            if not (-1 <= y <= height and -1 <= x <= width):
                continue  # such a sample counts as 0
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            for below, right in np.ndindex(2, 2):
                at_y, at_x = int(y) + below, int(x) + right
                weight = (1 - abs(y - at_y)) * (1 - abs(x - at_x))
                if weight > 0:
                    out[:, row, column] += weight * feature[:, at_y, at_x] / 4
    return out


def naive_extract(pyramid: list[torch.Tensor], rois: torch.Tensor) -> torch.Tensor:
    """Every box from the level of its scale, by loops."""
    out = []
    for image, *box in rois.tolist():
        side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = int(np.clip(np.floor(np.log2(side / FINEST_SCALE)), 0, len(pyramid) - 1))
        feature = pyramid[level][int(image)].detach().numpy()
        out.append(naive_roi_align(feature, np.array(box), 1 / STRIDES[level]))
    return torch.from_numpy(np.stack(out))


def make_neck(dims: list[int]) -> FPN:
    seed(1)
    neck = FPN(dims, CHANNELS, len(dims))
    neck.init_weights()
    return neck


def make_extractor(strides) -> SingleRoIExtractor:
    layer = dict(type='RoIAlign', output_size=BINS, sampling_ratio=2)
    return SingleRoIExtractor(layer, CHANNELS, list(strides), finest_scale=FINEST_SCALE)


def make_backbone(**kwargs) -> LaViT:
    seed(0)
    return LaViT('nano', **kwargs)


def double_copies(maps) -> list[torch.Tensor]:
    """The values of the maps in float64, packed anew and so certainly NCHW in memory."""
    return [torch.tensor(m.detach().tolist(), dtype=torch.float64).reshape(m.shape) for m in maps]


def assert_nchw(maps) -> None:
    for m in maps:
        assert m.is_contiguous(), (m.shape, m.stride())
        in_memory = m.detach().as_strided((m.numel(),), (1,), m.storage_offset())
        assert torch.equal(in_memory, m.detach().reshape(-1))


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    assert wanted.abs().max() > 0.05  # so that the tolerance means something


def check_roi_features(maps, height: int, width: int, out_indices=(0, 1, 2, 3)) -> torch.Tensor:
    """FPN and RoIAlign on ``maps`` against float64 and loops; the features."""
    assert_nchw(maps)
    strides = [STRIDES[i] for i in out_indices]
    neck = make_neck([DIMS[i] for i in out_indices])
    extractor = make_extractor(strides)
    rois = boxes(len(maps[0]), height, width)
    if len(strides) == len(STRIDES):
        assert extractor.map_roi_levels(rois, 4).unique().tolist() == [0, 1, 2, 3]
    features = extractor(neck(maps), rois.float())

    pyramid = copy.deepcopy(neck).double()(double_copies(maps))
    assert_nchw(pyramid)
    assert_close(features, extractor(pyramid, rois))
    if tuple(out_indices) == (0, 1, 2, 3):
        assert_close(features, naive_extract(pyramid, rois))
    return features


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mode', ['eval', 'train', 'train with_cp'])
def test_every_layout_of_the_images(layout, mode):
    seed(2)
    images = layouts(torch.randn(2, 3, 45, 71))[layout]
    backbone = make_backbone(with_cp='with_cp' in mode, drop_path_rate=0.0)
    backbone.train('train' in mode)
    maps = backbone(images)
    reference = copy.deepcopy(backbone).double()(images.double().contiguous())
    for m, wanted in zip(maps, reference, strict=True):
        assert_close(m, wanted)
    features = check_roi_features(maps, 45, 71)
    assert features.requires_grad


@pytest.mark.parametrize('layout', LAYOUTS)
def test_batch_of_one_and_dropped_paths(layout):
    """Strides are ambiguous where an axis has one element; stochastic depth goes other ways."""
    seed(3)
    images = layouts(torch.randn(1, 3, 52, 64))[layout]
    check_roi_features(make_backbone(drop_path_rate=0.5).train()(images), 52, 64)


@pytest.mark.parametrize('size', [(1, 1), (4, 4), (16, 16), (32, 32), (17, 33), (7, 100), (96, 1)])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_every_size(size, layout):
    """Maps that are padded to windows, and maps of a single row, column or token."""
    seed(4)
    images = layouts(torch.randn(2, 3, *size))[layout]
    check_roi_features(make_backbone().eval()(images), *size)


@pytest.mark.parametrize(
    'out_indices',
    [c for k in range(1, 5) for c in itertools.combinations(range(4), k)],
    ids=str,
)
def test_every_choice_of_stages(out_indices):
    seed(5)
    images = torch.randn(2, 3, 50, 40).contiguous(memory_format=torch.channels_last)
    maps = make_backbone(out_indices=out_indices).eval()(images)
    assert [m.shape[1] for m in maps] == [DIMS[i] for i in out_indices]
    check_roi_features(maps, 50, 40, out_indices)


@pytest.mark.parametrize('window_sizes', [(8, 8, 8, 8), (14, 14, 14, 7), (16, 8, 4, 2)], ids=str)
def test_backbone_itself_in_channels_last(window_sizes):
    """Only the backbone: in a whole detector so converted, FPN would still feed RoIAlign noise."""
    seed(6)
    images = torch.randn(2, 3, 61, 80)
    plain = make_backbone(window_sizes=window_sizes).eval()
    converted = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    maps = converted(images.contiguous(memory_format=torch.channels_last))
    for m, wanted in zip(maps, plain(images), strict=True):
        assert_close(m, wanted)
    check_roi_features(maps, 61, 80)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    seed(7)
    images = torch.randn(2, 3, 45, 71).contiguous(memory_format=torch.channels_last)
    if dtype == torch.float16 and not hasattr(torch.compiler, 'is_compiling'):
        pytest.skip('torch 2.1 has no float16 autocast on a CPU')
    with torch.autocast('cpu', dtype):
        maps = make_backbone().train()(images)
    check_roi_features([m.float() for m in maps], 45, 71)
    assert_nchw(maps)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradients(layout, with_cp):
    """RoIAlign's backward pass reads memory, too; what reaches the weights must be right."""
    seed(8)
    images = layouts(torch.randn(2, 3, 45, 71))[layout]
    backbone = make_backbone(with_cp=with_cp, drop_path_rate=0.0).train()
    double = copy.deepcopy(backbone).double()
    extractor, rois = make_extractor(STRIDES), boxes(2, 45, 71)
    target = torch.randn(len(rois), CHANNELS, BINS, BINS, dtype=torch.float64)
    neck = make_neck(list(DIMS))
    double_neck = copy.deepcopy(neck).double()
    (extractor(neck(backbone(images)), rois.float()) * target.float()).sum().backward()
    wanted = extractor(double_neck(double(images.double().contiguous())), rois)
    (wanted * target).sum().backward()
    for name in ('patch_embed.conv1.proj.weight', 'stages.1.blocks.1.attn.psi', 'norm3.weight'):
        got, expected = backbone.get_parameter(name).grad, double.get_parameter(name).grad
        error = (got - expected).norm() / expected.norm()
        assert error < 1e-4, (name, float(error))


def test_naive_roi_align_on_a_plane():
    """The loops themselves: on a linear map every bin holds the map's value at its centre."""
    y, x = np.mgrid[:12, :15].astype(float)
    box = np.array([9.0, 11.0, 33.0, 29.0])
    pooled = naive_roi_align((2 * x - 3 * y)[None], box, 1 / 4)
    for row, column in np.ndindex(BINS, BINS):
        at_x = (9 + 24 * (column + 0.5) / BINS) / 4 - 0.5
        at_y = (11 + 18 * (row + 0.5) / BINS) / 4 - 0.5
        assert pooled[0, row, column] == pytest.approx(2 * at_x - 3 * at_y, abs=1e-9)


def test_why_roi_align_reads_raw_memory():
    """The reason for all this. On channels_last it sees what lies in memory, taken as NCHW."""
    seed(9)
    feature = torch.randn(2, CHANNELS, 9, 13, dtype=torch.float64)
    turned = feature.contiguous(memory_format=torch.channels_last)
    rois = torch.tensor([[0, 2.0, 1.0, 9.0, 7.0], [1, 0.0, 3.0, 12.0, 8.0]], dtype=torch.float64)
    args = (rois, BINS, 1.0, 2, 'avg', True)
    right = torch.stack(
        [
            torch.from_numpy(naive_roi_align(feature[int(r[0])].numpy(), r[1:].numpy(), 1.0))
            for r in rois
        ]
    )
    torch.testing.assert_close(roi_align(feature, *args), right)
    got = roi_align(turned, *args)
    if torch.allclose(got, right):
        pytest.skip('this mmcv reads channels_last correctly: the rule could be relaxed')
    misread = turned.permute(0, 2, 3, 1).reshape(feature.shape)
    torch.testing.assert_close(got, roi_align(misread, *args))
