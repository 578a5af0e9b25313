"""The handwritten digits that scikit-learn ships: UCI, 1797 images of 8 x 8, ten classes. Every fifth image is for the test."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dbnet.data.formats.base import Format


class Digits(Format):
    """UCI handwritten digits, 8 x 8, from the scikit-learn package; nothing is downloaded."""

    kind: ClassVar[str] = "digits"

    def read(self) -> dict[str, Any]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = digits.images.astype(np.uint8), digits.target.astype(np.int64)
        test = np.arange(len(y)) % 5 == 4
        return {
            "train/x": x[~test],
            "train/y": y[~test],
            "test/x": x[test],
            "test/y": y[test],
            "classes": 10,
            "scale": 1 / 16,
            "name": "digits",
            "source": "UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak), CC BY 4.0, shipped by scikit-learn",
        }
