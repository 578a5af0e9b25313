"""Write speech.h5 and images.h5 beside this file, random data of the shapes of the paper's networks."""

from pathlib import Path

from dbnet.__main__ import main

SETS = {
    "speech.h5": ["--shape", "440", "--classes", "8192", "--train", "4000", "--test", "500"],
    "images.h5": ["--shape", "100,100,3", "--classes", "100", "--train", "600", "--test", "100"],
}

if __name__ == "__main__":
    for name, options in SETS.items():
        if code := main(["data", "random", str(Path(__file__).with_name(name)), *options]):
            raise SystemExit(code)
