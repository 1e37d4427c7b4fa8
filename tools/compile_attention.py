#!/usr/bin/env python
"""Compiles the attention for the CPU, as `make install` does. Without a compiler it names the replacement."""

if __name__ == "__main__":
    import early_signals  # noqa: F401  before the imports that take seconds

import time

from karat_det.attention.backends import cpu


def main() -> None:
    start = time.perf_counter()
    try:
        library = cpu.compile_library()
    except RuntimeError as error:
        print(f"{error} {cpu.CONSEQUENCE}")
    else:
        print(f"Attention on the CPU is compiled, after {time.perf_counter() - start:.0f} s: {library}")


if __name__ == "__main__":
    main()
