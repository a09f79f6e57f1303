"""Score machines by name: which patches are candidates of a pixel."""

from __future__ import annotations

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["IS", "ES", "LS", "ELS"]
Boundary: TypeAlias = Literal["zeros", "circular"]
