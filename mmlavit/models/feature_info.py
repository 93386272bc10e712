"""What the feature maps of a backbone are like, in the words that timm has for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FeatureInfo(tuple[dict[str, Any], ...]):
    """The maps that a backbone returns, in order, each a dict.

    ``num_chs`` is the number of its channels, ``reduction`` its stride in pixels of the image, and
    ``module`` the name of the module that it comes out of, with channels last. It is read as
    ``timm.models.FeatureInfo`` is; but that lists all that a network has, and this only what it
    returns, so an index is a place among the maps.
    """

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """One entry of the dicts.

        Args:
            key: ``'num_chs'``, ``'reduction'`` or ``'module'``.
            idx: The place of a map, places of several, or None for all.

        Returns:
            The entry of one map, or a list.

        Raises:
            KeyError: If there is no such entry.
            IndexError: If there is no such map.
        """
        if isinstance(idx, int):
            return self[idx][key]
        return [level[key] for level in (self if idx is None else [self[i] for i in idx])]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the maps; ``idx`` is that of :meth:`get`."""
        return self.get('num_chs', idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Strides of the maps, in pixels of the image; ``idx`` is that of :meth:`get`."""
        return self.get('reduction', idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Modules that the maps come out of; ``idx`` is that of :meth:`get`."""
        return self.get('module', idx)
