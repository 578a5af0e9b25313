"""Images in folders, a folder for each class: FOLDER/cat/1.png, FOLDER/dog/2.jpg, ...

Or with folders above: FOLDER/train/cat/1.png, FOLDER/test/cat/9.png, and FOLDER/validation. Classes are the folders' names in their
order. All images become --size: scaled until they cover it, and what is too much is cut off at both sides; without --size all must
be of one size. They are stored as bytes, colour channels last, and go into the network times 1 / 255. Needs Pillow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.data.formats.base import Format

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm"}
_PARTS = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}


def folders(top: Path) -> list[Path]:
    """Return the folders in a folder, by name; UserError where it cannot be read."""
    try:
        return sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"'{top}' cannot be read: {error.strerror}.") from None


def files(folder: Path) -> list[Path]:
    """Return the images in a class's folder, by name."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        inner = f"; it holds folders, like {folders(folder)[0].name}" if folders(folder) else ""
        raise UserError(f"'{folder}' holds no images ({', '.join(sorted(ENDINGS))}){inner}; a class is a folder of images.")
    return found


def parts_of(top: Path) -> dict[str, Path]:
    """Return the folders of the parts; of a folder of classes that of the training set."""
    if not top.is_dir():
        raise UserError(f"No folder '{top}'; give a folder that has a folder of images for each class.")
    found: dict[str, Path] = {}
    for path in folders(top):
        part = _PARTS.get(path.name)
        if part is not None and folders(path):
            if part in found:
                raise UserError(f"'{top}' has both {found[part].name} and {path.name}; keep one of them.")
            found[part] = path
    if found and "train" not in found:
        raise UserError(
            f"'{top}' has {', '.join(path.name for path in found.values())} but no train; its classes go into '{top}/train'."
        )
    if not found and not folders(top):
        raise UserError(f"'{top}' has no folders; images of a class go into a folder of its name, like '{top}/cat/1.png'.")
    return found or {"train": top}


def parsed_size(text: str) -> tuple[int, int] | None:
    """Return (rows, columns) of 32 or 32x48; None where nothing is asked for."""
    if not text:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if found is None:
        raise UserError(f"--size {text} is not a size; write 32 for 32 x 32, or ROWSxCOLUMNS like 32x48.")
    return int(found[1]), int(found[2] or found[1])


class Images(Format):
    """Images in folders, one folder for each class; png, jpg and others that Pillow reads."""

    kind: ClassVar[str] = "images"
    folder: str = Field(
        description="a folder of class folders, or of train, test and validation", json_schema_extra={"positional": True}
    )
    size: str = Field(default="", description="rows x columns of all images, like 32 or 32x48; default: all have one size")
    colour: Literal["auto", "rgb", "grey"] = Field(
        default="auto", description="three maps or one; default: grey where all images are, else rgb"
    )
    name: str = Field(default="", description="name of the data set; default: that of the folder")

    def read(self) -> dict[str, Any]:
        size, top = parsed_size(self.size), Path(self.folder)
        fits = size is not None
        parts = parts_of(top)
        names = [path.name for path in folders(parts["train"])]
        out: dict[str, Any] = {"name": self.name or top.resolve().name, "source": self.folder, "scale": 1 / 255}
        found: dict[str, list[tuple[Path, int]]] = {}
        for part, place in parts.items():
            strange = [path.name for path in folders(place) if path.name not in names]
            if strange:
                raise UserError(f"'{place}' has the class '{strange[0]}', which '{parts['train']}' does not have.")
            found[part] = [(path, names.index(folder.name)) for folder in folders(place) for path in files(folder)]
        grey = self.colour == "grey" or (self.colour == "auto" and all(_grey(path) for some in found.values() for path, _ in some))
        if size is None:
            size = next(_loaded([found["train"][0][0]], None, False, grey)).shape[:2]
        shape = (*size, 1 if grey else 3)
        self._check_memory(sum(map(len, found.values())), shape)
        for part, some in found.items():
            x = out[f"{part}/x"] = np.empty((len(some), *shape), np.uint8)
            for row, image in enumerate(_loaded([path for path, _ in some], size, fits, grey)):
                x[row] = image
            out[f"{part}/y"] = np.array([label for _, label in some], np.int64)
        return {**out, "classes": len(names), "class_names": names}

    def _check_memory(self, count: int, shape: tuple[int, ...]) -> None:
        """Raise UserError where all images, and two more while one is read, do not fit into memory."""
        needed, free = (count + 2) * prod(shape), _free()
        if needed > free:
            raise UserError(
                f"'{self.folder}': {count} images of {' x '.join(map(str, shape))} bytes need {needed / 2**30:,.1f} GiB, of which "
                f"{free / 2**30:,.1f} are free; take {'a smaller' if self.size else 'a'} --size, like 64, or fewer images."
            )


def _free() -> int:
    """Return the bytes of memory that this machine can give without swapping."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("Images are read with Pillow, which is not installed: pip install pillow.") from None
    return Image, ImageOps


def _opened(path: Path) -> Any:
    """Return an image, read whole; UserError where it is none."""
    image, _ = _pillow()
    try:
        with path.open("rb") as file:
            found = image.open(file)
            found.load()
        return found
    except (OSError, ValueError, SyntaxError, EOFError, image.DecompressionBombError) as error:
        said = "it is no image" if isinstance(error, image.UnidentifiedImageError) else str(error).rstrip(".")
        raise UserError(f"'{path}' cannot be read: {said}; remove it, or save it again.") from None


def _grey(path: Path) -> bool:
    image, _ = _pillow()
    try:
        with path.open("rb") as file, image.open(file) as found:
            return found.mode in ("1", "L", "LA") or found.mode.startswith("I")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError):
        # It is named when it is read.
        return True


def _loaded(paths: list[Path], size: tuple[int, int] | None, fits: bool, grey: bool) -> Iterator[np.ndarray]:
    """Yield images [rows, columns, maps] of bytes; brought to `size` if it `fits` them, which else they all must have."""
    image, ops = _pillow()
    for path in paths:
        found = ops.exif_transpose(_opened(path))
        if found.mode.startswith("I"):
            # Of 16 bits the upper ones.
            found = image.fromarray((np.asarray(found).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        found = found.convert("L" if grey else "RGB")
        here = found.size[1], found.size[0]
        size = size or here
        if here != size and not fits:
            raise UserError(
                f"'{path}' has {here[0]} x {here[1]} pixels (rows x columns), others have {size[0]} x {size[1]}; say --size "
                f"{size[0]}x{size[1]}, or another, to bring all to one."
            )
        if here != size:
            found = ops.fit(found, size[::-1], method=image.Resampling.BILINEAR)
        pixels = np.asarray(found)
        yield pixels[:, :, None] if grey else pixels
