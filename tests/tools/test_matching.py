"""The data with long-range relations: its labels, read again from the pictures alone."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from repository.experiments import matching
from repository.experiments.matching import (
    CLASSES,
    COLOURS,
    DISTANCE,
    IGNORED,
    MatchingRecipe,
    draw_pair,
    make_matching,
)

SIZE = 64
SMALL = MatchingRecipe(num_train=3, num_val=2, size=SIZE)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return draw_pair(np.random.default_rng(seed), SIZE)


def discs(labels: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Label, mask and centre of each labelled disc."""
    found = []
    for label in range(len(CLASSES)):
        count, parts, _, centres = cv2.connectedComponentsWithStats((labels == label).astype('u1'))
        found += [(label, parts == i, centres[i]) for i in range(1, count)]
    return found


def marked(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask and centre of the disc in the white ring: the hole that the ring encloses."""
    white = (image.min(axis=2) > 215).astype('u1')
    count, parts, stats, _ = cv2.connectedComponentsWithStats(white)
    ring = parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    contours, _ = cv2.findContours(ring.astype('u1'), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(white), contours, -1, 1, cv2.FILLED).astype(bool)
    ys, xs = np.nonzero(filled)
    inside = cv2.erode((filled & ~ring).astype('u1'), np.ones((3, 3))).astype(bool)
    return inside, np.array([xs.mean(), ys.mean()])


def nearest_colour(image: np.ndarray, mask: np.ndarray) -> int:
    mean = image[mask].mean(axis=0)
    return int(np.argmin([np.linalg.norm(mean - colour) for colour in COLOURS]))


def test_a_label_says_whether_a_disc_has_the_colour_of_the_marked_one():
    for seed in range(60):
        image, labels = drawn(seed)
        reference, _ = marked(image)
        assert (labels[reference] == IGNORED).all(), seed
        colour = nearest_colour(image, reference)
        found = discs(labels)
        assert found, seed
        for label, mask, _ in found:
            same = nearest_colour(image, mask) == colour
            assert CLASSES[label] == ('same' if same else 'different'), seed


def test_related_discs_are_half_an_image_apart():
    for seed in range(60):
        image, labels = drawn(seed)
        _, centre = marked(image)
        for _, _, other in discs(labels):
            # A pixel of slack: centres are read from pixels.
            assert np.linalg.norm(centre - other) > DISTANCE * SIZE - 1, seed


def test_without_the_marked_disc_nothing_is_better_than_chance():
    """For each own colour and number of others of that colour, the labels are even."""
    votes: dict[tuple[int, int], list[int]] = {}
    for seed in range(600):
        image, labels = drawn(seed)
        found = [(label, nearest_colour(image, mask)) for label, mask, _ in discs(labels)]
        for label, colour in found:
            alike = sum(c == colour for _, c in found)
            votes.setdefault((colour, alike), []).append(label)
    assert sum(map(len, votes.values())) > 1200
    for case, labels in votes.items():
        # Four standard errors of a fair coin; discs of one image fall together, hence the 2.
        slack = 4 * np.sqrt(2) * 0.5 / np.sqrt(len(labels))
        assert abs(np.mean(labels) - 0.5) < slack, case


def test_files_are_written_once_and_whole(tmp_path):
    root = tmp_path / 'data' / 'matching'
    make_matching(root, SMALL)
    files = {p: p.stat().st_mtime_ns for p in root.rglob('*') if p.is_file()}
    assert len(files) == 2 * 5 + 1
    assert [p.name for p in root.parent.iterdir()] == ['matching']
    image, labels = draw_pair(np.random.default_rng([0, 1, 1]), SIZE)
    assert (cv2.imread(str(root / 'images/val/00001.png')) == image).all()
    assert (cv2.imread(str(root / 'labels/val/00001.png'), cv2.IMREAD_UNCHANGED) == labels).all()
    make_matching(root, SMALL)
    assert files == {p: p.stat().st_mtime_ns for p in root.rglob('*') if p.is_file()}


def test_what_is_there_is_not_overwritten(tmp_path):
    make_matching(tmp_path / 'matching', SMALL)
    with pytest.raises(FileExistsError, match='matching holds something else'):
        make_matching(tmp_path / 'matching', replace(SMALL, seed=1))
    with pytest.raises(FileExistsError, match='holds something else'):
        make_matching(tmp_path, SMALL)


def test_files_of_another_version_are_not_taken_for_these(tmp_path, monkeypatch):
    make_matching(tmp_path / 'matching', SMALL)
    monkeypatch.setattr(matching, 'VERSION', matching.VERSION + 1)
    with pytest.raises(FileExistsError, match='matching holds something else'):
        make_matching(tmp_path / 'matching', SMALL)


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cv2, 'imencode', fail)
    with pytest.raises(KeyboardInterrupt):
        make_matching(tmp_path / 'matching', SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'values, error, message',
    [
        ({'num_train': 0}, ValueError, 'num_train must be >= 1, got 0'),
        ({'size': 47}, ValueError, 'size must be >= 48, got 47'),
        ({'seed': -1}, ValueError, 'seed must be >= 0, got -1'),
        ({'num_val': 2.0}, TypeError, 'num_val must be an int >= 1, got 2.0'),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        MatchingRecipe(**values)
