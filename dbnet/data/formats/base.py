"""What a format is: options of `dbnet data KIND`, and arrays named as in the data file that is written from them."""

from __future__ import annotations

from typing import Any, ClassVar

from dbnet.core.registry import Member


class Format(Member):
    """Base of all formats: its fields are the command's options; `read` returns the arrays."""

    family: ClassVar[str] = "data.formats"

    def read(self) -> dict[str, Any]:
        """Return {"train/x": array, ..., "classes": int, "scale": float, "name": str, "source": str}."""
        raise NotImplementedError
