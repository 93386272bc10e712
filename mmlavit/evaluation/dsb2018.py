"""The score of the 2018 Data Science Bowl, for instance masks of mmdet."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

#: Intersections over union, 0.50 to 0.95, that a mask has to exceed to count as found.
THRESHOLDS = np.arange(50, 100, 5) / 100


@METRICS.register_module()
class DSB2018Metric(BaseMetric):
    """Mean over images of the mean over thresholds of TP / (TP + FP + FN).

    At a threshold a predicted mask is a true positive (TP) if its intersection over union with a
    true mask exceeds it, and a false one (FP) if not; true masks that no prediction found are false
    negatives (FN). The contest wanted masks that do not overlap and have no scores, so predictions
    below ``score_thr`` are left out, and pixels of several masks belong to the one with the highest
    score. Classes are not told apart. An image with no true mask scores 1 where none is predicted,
    else 0.

    Source: https://www.kaggle.com/c/data-science-bowl-2018/overview/evaluation

    Args:
        ann_file: The true masks, in COCO's format.
        score_thr: Least score of predictions that count, 0 to 1.
        collect_device: As of ``BaseMetric``.
        prefix: As of ``BaseMetric``.

    Raises:
        ValueError: If ``score_thr`` is not between 0 and 1, or a sample is of an image that
            ``ann_file`` does not have.
    """

    default_prefix = 'dsb2018'

    def __init__(
        self,
        ann_file: str,
        score_thr: float = 0.5,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not 0 <= score_thr <= 1:
            raise ValueError(f'score_thr must be between 0 and 1, got {score_thr}')
        # Not needed before, and `import mmlavit` comes without pycocotools.
        from pycocotools.coco import COCO

        self.ann_file = ann_file
        self.score_thr = score_thr
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco = COCO(ann_file)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Score the images of a batch.

        Args:
            data_batch: Not used.
            data_samples: Of each image ``img_id`` and ``pred_instances`` with ``scores`` ``(N,)``
                and ``masks``, a ``(N, H, W)`` tensor or N run-length encoded ones.
        """
        from pycocotools import mask as coco_mask

        for sample in data_samples:
            image_id, predicted = sample['img_id'], sample['pred_instances']
            if image_id not in self._coco.imgs:
                raise ValueError(f'{self.ann_file} has no image with the id {image_id!r}')
            truth = [self._coco.annToRLE(a) for a in self._coco.imgToAnns[image_id]]
            masks = predicted['masks']
            if isinstance(masks, Sequence):
                masks = [coco_mask.decode(mask) for mask in masks]
            else:
                masks = masks.cpu().numpy()
            # Mask Scoring R-CNN's masks have scores of their own.
            scores = predicted.get('mask_scores', predicted['scores']).cpu().numpy()
            kept = [i for i in np.argsort(-scores, kind='stable') if scores[i] >= self.score_thr]
            self.results.append(image_score([masks[i] for i in kept], truth))

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        """The mean over images.

        Args:
            results: The score of each image.
        """
        return {'score': float(np.mean(results))}


def image_score(masks: Sequence[np.ndarray], truth: Sequence[dict[str, Any]]) -> float:
    """The contest's score of one image.

    Args:
        masks: Predictions, each ``(H, W)`` and 0 where it is not; where they overlap, pixels belong
            to the first.
        truth: True masks, run-length encoded.

    Returns:
        0 to 1.
    """
    from pycocotools import mask as coco_mask

    apart = []
    taken = np.zeros(masks[0].shape if masks else (), bool)
    for mask in masks:
        own = (mask != 0) & ~taken
        taken |= own
        if own.any():
            apart.append(coco_mask.encode(np.asfortranarray(own, dtype=np.uint8)))
    if not apart or not truth:
        return float(len(apart) == len(truth))
    overlap = coco_mask.iou(apart, list(truth), [0] * len(truth))
    # Of masks apart from each other only one covers over half of a true one, so those that found
    # one are as many as the pairs.
    found = (overlap[..., None] > THRESHOLDS).any(1).sum(0)
    return float(np.mean(found / (len(apart) + len(truth) - found)))
