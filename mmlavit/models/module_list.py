"""PyTorch's ``ModuleList``, which type checkers see as a list of one kind of module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import nn

if TYPE_CHECKING:
    M = TypeVar('M', bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[M]):
        """PyTorch's own says of what is in it only that it is some module."""

        def __init__(self, modules: Iterable[M] | None = None) -> None: ...

        def __iter__(self) -> Iterator[M]: ...

        @overload
        def __getitem__(self, index: slice) -> ModuleList[M]: ...

        @overload
        def __getitem__(self, index: int) -> M: ...

        def __getitem__(self, index: Any) -> Any: ...

else:
    ModuleList = nn.ModuleList
