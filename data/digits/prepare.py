"""Write digits.h5 beside this file: UCI handwritten digits as scikit-learn ships them; nothing is downloaded."""

from pathlib import Path

from dbnet.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["data", "digits", str(Path(__file__).with_name("digits.h5"))]))
