"""Does pretraining help? A segmentor on the shapes data, from scratch and from a classifier."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from mmlavit.datasets.shapes import ShapesRecipe, make_shapes

from .demo import DEMOS, SHAPES, read_scalars, train

WORK_DIR = Path('work_dirs/demo-seg-pretrained')


def compare(out: Path) -> Path:
    """Train the classifier of the demo, then UPerNet with and without its weights, and plot.

    Data, seed, iterations and all settings are the same; only the backbone's first weights differ.
    What an earlier call or the demos have trained is not trained again.

    Args:
        out: Picture to write.

    Returns:
        ``out``.

    Raises:
        subprocess.CalledProcessError: If a training fails; its output says why.
    """
    make_shapes(SHAPES, ShapesRecipe())
    checkpoint = train(DEMOS['cls'].config, DEMOS['cls'].work_dir)
    curves = {}
    for name, work_dir, options in (
        ('from scratch', DEMOS['seg'].work_dir, []),
        ('from the classifier', WORK_DIR, [f'model.backbone.init_cfg.checkpoint={checkpoint}']),
    ):
        train(DEMOS['seg'].config, work_dir, *options)
        records = [record for record in read_scalars(work_dir) if 'mIoU' in record]
        curves[name] = {record['step']: record['mIoU'] for record in records}
        print(f'{name}: ' + ', '.join(f'{s}: {v:.1f}' for s, v in curves[name].items()))
    return draw(curves, out)


def draw(curves: dict[str, dict[int, float]], out: Path) -> Path:
    """Plot mIoU on held-out shapes over iterations.

    Args:
        curves: By name, the mIoU (0 to 100) after so many iterations.
        out: Picture to write.

    Returns:
        ``out``.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4), layout='constrained')
    for name, curve in curves.items():
        panel.plot(list(curve), list(curve.values()), 'o-', label=name)
    panel.set(
        title='UPerNet, LaViT-nano, held-out shapes',
        xlabel='iteration',
        ylabel='mIoU',
        ylim=(0, 100),
    )
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out
