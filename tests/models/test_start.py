"""What a fresh LaViT does with its tokens: no branch drowns the others, at any depth."""

import itertools
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small import seeded
from torch import Tensor, nn

from mmlavit import ARCHS, LaViT

DEEP = dict(
    embed_dims=(32, 64, 96, 128),
    num_heads=(1, 2, 3, 4),
    depths=(2, 4, 36, 3),
    vanilla_depths=(1, 1, 2, 1),
    mlp_ratios=(4, 4, 4, 4),
)
SIDE = 128


def noise(seed: int) -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=seeded(seed))


def photographs(seed: int) -> Tensor:
    """Two photographs as a detector gets them: scaled, and normalized over ImageNet."""
    if 'MMLAVIT_DATA' not in os.environ:
        pytest.skip('MMLAVIT_DATA, the folder of real images, is not set')
    paths = sorted(Path(os.environ['MMLAVIT_DATA'], 'coco50').rglob('*.jpg'))
    chosen = [cv2.imread(str(paths[i])) for i in (2 * seed, 2 * seed + 1)]
    pixels = np.stack([cv2.resize(image, (SIDE, SIDE)) for image in chosen])[..., ::-1]
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return ((torch.from_numpy(pixels.copy()) - mean) / std).permute(0, 3, 1, 2).contiguous()


def spread(x: Tensor) -> float:
    """Standard deviation over all tokens and channels."""
    return x.detach().std().item()


def like_weights(block: nn.Module) -> dict[str, Tensor]:
    """Gradients of the weights that every layer has; of Q, K and V only V's."""
    attn = block.attn
    values = attn.qkv.weight.grad.chunk(3)[2] if hasattr(attn, 'qkv') else attn.v.weight.grad
    return {
        'fc1': block.mlp.fc1.weight.grad,
        'proj': attn.proj.weight.grad,
        'pos_conv': block.pos_conv.weight.grad,
        'v': values,
    }


def test_what_all_channels_have_in_common_does_not_leave_the_stem():
    """GELU lifts all channels; tokens that share what comes of it are hard to tell apart."""
    torch.manual_seed(0)
    second = LaViT('nano').patch_embed.conv2.proj
    with torch.no_grad():
        common = second(torch.full((1, 32, 16, 16), 0.5))[..., 1:, 1:]
        mixed = second(torch.randn(1, 32, 16, 16))
    assert common.abs().max() < 1e-5 < 0.1 < mixed.std()


@pytest.mark.parametrize('seed', range(2))
def test_what_is_the_same_everywhere_has_no_position(seed):
    """Away from the borders the position convolutions leave out even maps."""
    torch.manual_seed(seed)
    for name, module in LaViT('nano').named_modules():
        if name.endswith('pos_conv'):
            branch = module(torch.ones(1, module.in_channels, 6, 6))
            assert branch[..., 1:-1, 1:-1].abs().max() < 1e-5 < branch.abs().max(), name


@pytest.mark.parametrize('images', [noise, photographs])
@pytest.mark.parametrize('arch', [*ARCHS, 'deep'])
@pytest.mark.parametrize('seed', range(2))
def test_the_start(arch, images, seed):
    x = images(seed)
    torch.manual_seed(seed)
    model = LaViT(DEEP if arch == 'deep' else arch, drop_path_rate=0.0)
    model.init_weights()
    shares: dict[tuple[int, int], dict[str, float]] = {}
    streams: dict[int, list[float]] = {}
    for m, stage in enumerate(model.stages):
        for i, block in enumerate(stage.blocks):
            of_layer = shares[m, i] = {}

            def watch(branch: str, of_layer: dict = of_layer):
                def hook(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
                    added = out[0] if isinstance(out, tuple) else out
                    of_layer[branch] = spread(added) / spread(args[0])

                return hook

            def follow(block: nn.Module, args: tuple, out: tuple, m: int = m) -> None:
                streams.setdefault(m, []).append(spread(out[0]))

            def enter(block: nn.Module, args: tuple, m: int = m) -> None:
                streams.setdefault(m, [spread(args[0])])

            for branch in ('pos_conv', 'attn', 'mlp'):
                block.get_submodule(branch).register_forward_hook(watch(branch))
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(follow)
    last = model(x)[-1]
    (last * torch.randn(last.shape, generator=seeded(seed + 9))).sum().backward()

    for m, stream in streams.items():
        assert max(stream) <= 2 * stream[0], (m, stream)
    for place, of_layer in shares.items():
        assert max(of_layer.values()) <= 0.75, (place, of_layer)
        assert min(of_layer.values()) > 1e-4, (place, of_layer)
    for m, stage in enumerate(model.stages):
        assert shares[m, 0]['pos_conv'] >= 0.1, shares[m, 0]
        first, final = like_weights(stage.blocks[0]), like_weights(stage.blocks[-1])
        for name in first:
            ratio = (first[name].norm() / final[name].norm()).item()
            assert 1 / 3 <= ratio <= 3, (m, name, ratio)
    assert len(streams) == 4 and all(
        len(streams[m]) == len(stage.blocks) + 1 for m, stage in enumerate(model.stages)
    )
    assert set(itertools.chain(*shares.values())) == {'pos_conv', 'attn', 'mlp'}


@pytest.mark.parametrize('layer', ['Linear', ['Conv2d', 'Linear']], ids=str)
def test_what_stands_around_does_not_change_the_start(layer):
    """mmpretrain's models of transformers draw every linear layer in them from 0.02."""
    model = build_classifier()
    model.init_cfg[0]['layer'] = layer
    model.init_weights()
    second = model.backbone.patch_embed.conv2.proj.weight.detach()
    assert second.mean(dim=(1, 2, 3)).abs().max() < 1e-6 < 0.05 < second.std()
    block = model.backbone.stages[2].blocks[0]
    for layer in (block.attn.qkv, block.mlp.fc1):
        assert layer.weight.std().item() * layer.in_features**0.5 == pytest.approx(1, abs=0.05)
    head = model.head.fc.weight.std().item()
    assert head == pytest.approx(0.02, rel=0.1), 'what the config asks for the head has to stay'


@pytest.mark.parametrize('options', [{}, dict(arch='base', out_indices=0), dict(out_indices=0)])
def test_loaded_weights_are_not_drawn_anew(options):
    """A backbone that is put into another model after it was loaded, without init_cfg."""
    if options.get('arch') == 'base':
        # No less attention and no residual: no weight outside a layer of PyTorch's.
        arch = LaViT('base').arch
        options = {**options, 'arch': {**vars(arch), 'vanilla_depths': arch.depths}}
    source, model = (LaViT(**{'arch': 'nano', **options}) for _ in range(2))
    model.load_state_dict(source.state_dict())
    model.init_weights()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name]), name


def test_untouched_weights_are_not_drawn_anew():
    model = LaViT('nano')
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.to(torch.float64).float().init_weights()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_pretrained_weights_are_not_drawn_anew(tmp_path):
    source = LaViT('nano', out_indices=(3,))
    path = tmp_path / 'nano.pth'
    torch.save(source.state_dict(), path)
    model = build_classifier(init_cfg=dict(checkpoint=str(path), prefix=None))
    model.init_weights()
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name]), name


def build_classifier(**backbone: object) -> nn.Module:
    """A classifier as mmpretrain's configs of Swin make it, with LaViT-nano."""
    pytest.importorskip('mmpretrain')
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    print('seed 0')
    torch.manual_seed(0)
    config = dict(
        type='ImageClassifier',
        backbone=dict(type='LaViT', arch='nano', out_indices=(3,), **backbone),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=100, in_channels=320, init_cfg=None),
        init_cfg=[
            dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
            dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
        ],
    )
    # What it is made of is looked up in the scope that another test may have left.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(config)
