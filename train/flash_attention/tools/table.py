"""Plain text tables and a progress bar: what every command prints with."""

import math
import sys
import time


def format_table(header, rows):
    """Columns padded to their widest cell, header underlined; cells are str()-ed."""
    lines = [[str(cell) for cell in line] for line in [header] + rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths)] + text[1:])


class _Plain:
    """Progress without tqdm: lines on stderr, at least ``every`` seconds apart, and one at the end."""

    def __init__(self, total, desc, every):
        self.total, self.done, self.desc, self.every = total, 0, desc, every
        self.step, self.last = "", -math.inf

    def set_postfix_str(self, text):
        self.step = text

    def update(self, steps=1):
        self.done += steps
        now = time.monotonic()
        if now - self.last >= self.every or self.done >= self.total:
            self.last = now
            sys.stderr.write("{}: {}/{} {}\n".format(self.desc, self.done, self.total, self.step))

    def close(self):
        pass


def progress(total, desc, every=0.0):
    """A tqdm bar, or lines of text, ``every`` seconds apart, without tqdm or where stderr is no terminal."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return _Plain(total, desc, every)
        return tqdm(total=total, desc=desc)
    return _Plain(total, desc, every)
