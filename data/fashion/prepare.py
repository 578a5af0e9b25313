"""Write fashion.h5 beside this file from the four Fashion-MNIST archives: python data/fashion/prepare.py FOLDER."""

import sys
from pathlib import Path

from dbnet.__main__ import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python data/fashion/prepare.py FOLDER   (that holds the four *-ubyte.gz files)")
    folder, words = Path(sys.argv[1]), ["data", "idx", "--name", "fashion"]
    for part, stem in (("train", "train"), ("test", "t10k")):
        words += [f"--{part}-images", str(folder / f"{stem}-images-idx3-ubyte.gz")]
        words += [f"--{part}-labels", str(folder / f"{stem}-labels-idx1-ubyte.gz")]
    raise SystemExit(main([*words, str(Path(__file__).with_name("fashion.h5"))]))
