"""Draws docs/start.png: what fresh backbones do with their tokens, layer by layer.

Above, how far the standard deviation of the token stream has come since the stage began; below,
what each branch of a layer adds, as a share of the stream. LaViT-B as it starts and as it once did,
with mmdet's Swin-T and PVTv2-B2 beside it, on noise of 224 x 224 pixels, drop path 0.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from repository.experiments.variants import register_backbones

OUT = Path('docs/start.png')
SEEDS = 3
BACKBONES = {
    'LaViT-B': dict(type='LaViT', arch='base', drop_path_rate=0.0),
    'LaViT-B as it was': dict(
        type='AblatedLaViT',
        arch='base',
        drop_path_rate=0.0,
        position_std=(2 / 9) ** 0.5,
        linear_std=0.02,
    ),
    'Swin-T': dict(type='mmdet.SwinTransformer', drop_path_rate=0.0),
    'PVTv2-B2': dict(
        type='mmdet.PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        drop_path_rate=0.0,
    ),
}
COLOURS = {'position convolution': 'tab:green', 'attention': 'tab:blue', 'MLP': 'tab:orange'}


class Stream:
    """Follows the tokens through a backbone.

    Args:
        backbone: A LaViT, Swin or PVTv2; it is left with hooks on it.
    """

    def __init__(self, backbone: nn.Module) -> None:
        #: For each layer its stage and the standard deviation of the tokens before and after it.
        self.layers: list[tuple[int, float, float]] = []
        #: For each branch its share of the stream that it is added to, layer by layer.
        self.shares: dict[str, list[float]] = {}
        for stage, layer in _layers(backbone):

            def follow(layer: nn.Module, args: tuple, out: object, stage: int = stage) -> None:
                self.layers.append((stage, _spread(args[0]), _spread(_tokens(out))))

            layer.register_forward_hook(follow)
            for name, module in _branches(layer).items():

                def add(
                    module: nn.Module, args: tuple, kwargs: dict, out: object, name: str = name
                ) -> None:
                    branch, into = _tokens(out), args[0]
                    if 'identity' in kwargs:
                        # mmdet's add the shortcut inside.
                        into = kwargs['identity']
                        branch = branch - into
                    self.shares.setdefault(name, []).append(_spread(branch) / _spread(into))

                module.register_forward_hook(add, with_kwargs=True)


def _layers(backbone: nn.Module) -> list[tuple[int, nn.Module]]:
    if hasattr(backbone, 'layers'):  # PVT
        return [(m, layer) for m, parts in enumerate(backbone.layers) for layer in parts[1]]
    return [(m, layer) for m, stage in enumerate(backbone.stages) for layer in stage.blocks]


def _branches(layer: nn.Module) -> dict[str, nn.Module]:
    if hasattr(layer, 'pos_conv'):
        parts = (layer.pos_conv, layer.attn, layer.mlp)
        return dict(zip(COLOURS, parts, strict=True))
    return {'attention': layer.attn, 'MLP': layer.ffn}


def _tokens(out: Tensor | tuple) -> Tensor:
    """What a layer or branch returns, without the scores that LaViT's have beside it."""
    return out[0] if isinstance(out, tuple) else out


def _spread(x: Tensor) -> float:
    return x.std().item()


def measure(backbone: dict, seed: int) -> Stream:
    """Run a fresh backbone once.

    Args:
        backbone: Its config.
        seed: Of its weights and of the noise.

    Returns:
        What its layers did.
    """
    torch.manual_seed(seed)
    model = MODELS.build(backbone)
    model.init_weights()
    stream = Stream(model)
    model(torch.randn(2, 3, 224, 224))
    return stream


def _mean(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows).mean(dim=0).tolist()


def main() -> None:
    """Measure and draw."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    register_backbones()
    figure, panels = plt.subplots(
        2, len(BACKBONES), figsize=(13, 5.4), sharey='row', sharex='col', layout='constrained'
    )
    for (title, config), (above, below) in zip(BACKBONES.items(), panels.T, strict=True):
        streams = [measure(config, seed) for seed in range(SEEDS)]
        stages = [stage for stage, _, _ in streams[0].layers]
        firsts = [stages.index(stage) for stage in stages]
        growth = [
            _mean([[s.layers[i][2] / s.layers[first][1]] for s in streams])[0]
            for i, first in enumerate(firsts)
        ]
        places = range(1, len(stages) + 1)
        above.axhline(2, color='grey', linestyle=':')
        for stage in sorted(set(stages)):
            own = [i for i, s in enumerate(stages) if s == stage]
            xs = [own[0] + 0.5, *(i + 1 for i in own)]
            above.plot(xs, [1, *(growth[i] for i in own)], 'o-', color='black', markersize=3)
            for panel in (above, below):
                if stage:
                    panel.axvline(own[0] + 0.5, color='lightgrey', linewidth=0.8)
        above.set(title=title, yscale='log')
        below.axhline(0.75, color='grey', linestyle=':')
        for name, colour in COLOURS.items():
            if name in streams[0].shares:
                shares = _mean([s.shares[name] for s in streams])
                below.plot(places, shares, 'o-', color=colour, label=name, markersize=3)
        below.set(xlabel='layer', yscale='log')
        print(f'{title}: largest growth over a stage {max(growth):.3g}')
    panels[0][0].set_ylabel('stream, times its\nstart of the stage')
    panels[1][0].set_ylabel('what a branch adds,\nas a share of the stream')
    panels[1][0].legend(fontsize=8, loc='lower left')
    figure.savefig(OUT, dpi=100)


if __name__ == '__main__':
    with torch.no_grad():
        main()
