"""``python -m flash_attention.ascend.simulator``: prints the table of supported instructions."""

from .isa import table

if __name__ == "__main__":
    print("\n".join(table()))
