"""What a model makes of test images, beside their labels: the best, the median and the worst."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import VISUALIZERS, DefaultScope
from mmengine.runner import Runner
from tqdm import tqdm

from mmlavit.engine.checkpoint_file import guard_checkpoints
from mmlavit.evaluation.dsb2018 import DSB2018Metric
from mmlavit.inference.drawing import ClassColourVisualizer

from .tasks import TASKS
from .training import committed

SURE = 0.5  # least score of a box or a mask that is drawn
WIDTH = 11.0  # of the picture, in inches


def _certainty(sample: Any, metainfo: dict[str, Any]) -> float:
    return float(sample.pred_score[sample.gt_label].mean())


def _iou(sample: Any, metainfo: dict[str, Any]) -> float:
    from mmseg.evaluation import IoUMetric

    classes = len(metainfo['classes'])
    found, labels = sample.pred_sem_seg.data.squeeze(), sample.gt_sem_seg.data.squeeze()
    both, either, _, _ = IoUMetric.intersect_and_union(found.cpu(), labels.cpu(), classes, 255)
    return float((both / either)[either > 0].mean())


def _average_precision(sample: Any, metainfo: dict[str, Any]) -> float:
    from mmdet.evaluation import eval_map

    found, labels = sample.pred_instances.cpu().numpy(), sample.gt_instances.cpu().numpy()
    boxes = np.column_stack([found.bboxes, found.scores])
    by_class = [boxes[found.labels == i] for i in range(len(metainfo['classes']))]
    truth = dict(bboxes=_boxes(labels.bboxes), labels=labels.labels)
    return float(eval_map([by_class], [truth], iou_thr=0.5, logger='silent')[0])


def _boxes(boxes: Any) -> np.ndarray:
    return np.asarray(getattr(boxes, 'tensor', boxes), dtype=np.float32)


def _contest(sample: Any, metainfo: dict[str, Any]) -> float:
    metric = _contest_metric()
    metric.process(None, [sample.to_dict()])
    return metric.results[-1]


@functools.cache
def _contest_metric() -> DSB2018Metric:
    return DSB2018Metric(committed(TASKS['dsb2018'].config).test_evaluator[1].ann_file)


#: By task: the score of one image, and what it is called.
SCORES: dict[str, tuple[str, Callable[[Any, dict[str, Any]], float]]] = {
    'tinyimagenet': ('probability of the true class', _certainty),
    'camvid': ('mIoU of the classes that are there', _iou),
    'dsb2018': ('contest score', _contest),
    'bccd': ('AP50', _average_precision),
}


class _Keep(Hook):
    """Keeps the score of each test image, and what is drawn of those that may be asked for."""

    def __init__(self, score: Callable[[Any, dict[str, Any]], float], total: int) -> None:
        self.score = score
        self.samples: list[tuple[float, Any]] = []
        self.bar = tqdm(total=total, desc='test images')

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[Any]
    ) -> None:
        """Score the images of a batch."""
        for sample in outputs:
            metainfo = runner.test_dataloader.dataset.metainfo
            score = self.score(sample, metainfo)
            if 'pred_instances' in sample:
                # The masks of all that a detector is unsure of would take gigabytes.
                sample.pred_instances = sample.pred_instances[sample.pred_instances.scores > SURE]
            self.samples.append((score, sample.cpu()))
            self.bar.update()


def draw(task: str, checkpoint: Path, out: Path, count: int = 3) -> Path:
    """Draw predictions beside labels on test images of the task.

    The images are ranked by their own score (:data:`SCORES`). With three, the best, the median and
    the worst are drawn; in general, as many as asked for at equal distances in the ranking, both
    ends among them.

    Args:
        task: Name in :data:`~repository.real_images.tasks.TASKS`.
        checkpoint: Of a training of the task; the ``config.py`` beside it is its config, or if
            there is none, the committed one.
        out: Picture to write.
        count: How many images, at least 2.

    Returns:
        ``out``.

    Raises:
        ValueError: If ``count`` is less than 2.
        FileNotFoundError: If the checkpoint is not there.
    """
    if count < 2:
        raise ValueError(f'images must be at least 2, got {count}')
    if not checkpoint.is_file():
        raise FileNotFoundError(f'{checkpoint} is not there')
    guard_checkpoints()
    beside = checkpoint.with_name('config.py')
    cfg = Config.fromfile(beside if beside.is_file() else TASKS[task].config)
    cfg.load_from = str(checkpoint)
    cfg.log_level = 'ERROR'
    title, score = SCORES[task]
    scope = DefaultScope.overwrite_default_scope(cfg.default_scope)
    with tempfile.TemporaryDirectory() as folder, scope:
        cfg.work_dir = folder
        # One of the config's name would be kept for the process, with its folder.
        drawn_by = dict(type=ClassColourVisualizer) if cfg.default_scope == 'mmdet' else {}
        visualizer = VISUALIZERS.build(
            {**cfg.visualizer, **drawn_by, 'name': folder, 'save_dir': folder}
        )
        cfg.visualizer = None
        runner = Runner.from_cfg(cfg)
        keep = _Keep(score, len(runner.build_dataloader(cfg.test_dataloader).dataset))
        runner.register_hook(keep)
        runner.test()
        keep.bar.close()
        visualizer.dataset_meta = runner.test_dataloader.dataset.metainfo
        # The images of the ends first and last, ties in the order of the data.
        ranked = sorted(keep.samples, key=lambda pair: -pair[0])
        ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
        scratch = Path(folder) / 'drawn.png'
        rows = [
            (rank, *ranked[rank], _picture(visualizer, task, ranked[rank][1], scratch))
            for rank in ranks
        ]
    return _sheet(rows, f'{TASKS[task].title}: {checkpoint}', title, len(ranked), out)


def _picture(visualizer: Any, task: str, sample: Any, scratch: Path) -> np.ndarray:
    """Labels on the left, predictions on the right, as the toolbox draws them into a file."""
    image = mmcv.imread(sample.img_path, channel_order='rgb')
    if task == 'tinyimagenet':
        visualizer.visualize_cls(image, sample, rescale_factor=6, out_file=str(scratch))
    else:
        options = {} if task == 'camvid' else dict(pred_score_thr=SURE)
        visualizer.add_datasample('image', image, sample, out_file=str(scratch), **options)
    return mmcv.imread(scratch, channel_order='rgb')


def _sheet(rows: list[tuple], head: str, title: str, total: int, out: Path) -> Path:
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    height = sum(0.35 + WIDTH * picture.shape[0] / picture.shape[1] for *_, picture in rows)
    figure, panels = plt.subplots(
        len(rows), 1, figsize=(WIDTH, height + 0.7), layout='constrained', squeeze=False
    )
    for panel, (rank, score, sample, picture) in zip(panels[:, 0], rows, strict=True):
        name = Path(sample.img_path).name
        place = f'image {rank + 1} of {total} by {title}, {score:.2f}: {name}'
        panel.set_title(place, fontsize=9, loc='left')
        panel.imshow(picture)
        panel.axis('off')
    sides = '' if 'pred_score' in rows[0][2] else '\nlabels on the left, predictions on the right'
    figure.suptitle(head + sides, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out
