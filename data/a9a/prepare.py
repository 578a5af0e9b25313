"""Write a9a.h5 beside this file from the LIBSVM files a9a and a9a.t: python data/a9a/prepare.py FOLDER."""

import sys
from pathlib import Path

from dbnet.__main__ import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python data/a9a/prepare.py FOLDER   (that holds the files a9a and a9a.t)")
    folder = Path(sys.argv[1])
    words = ["data", "libsvm", "--train", str(folder / "a9a"), "--test", str(folder / "a9a.t"), "--name", "a9a"]
    raise SystemExit(main([*words, str(Path(__file__).with_name("a9a.h5"))]))
