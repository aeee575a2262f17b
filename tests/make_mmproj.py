"""Writes an mmproj GGUF with the shapes of the real vision tower and random weights, to measure speed with.

    python tests/make_mmproj.py OUT.gguf [--layers 24] [--width 1024] [--heads 16] [--out-width 4096] [--type F16]

With the defaults it takes 0.9 GB.  --out-width is the hidden size of the text model it shall go with.
"""

import argparse

from ms4.quant.tiny_tower import write_mmproj


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--out-width", type=int, default=4096)
    parser.add_argument("--type", default="F16")
    a = parser.parse_args()
    write_mmproj(a.out, a.layers, a.width, a.heads, a.out_width, a.type)


if __name__ == "__main__":
    main()
