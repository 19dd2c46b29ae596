"""``python -m flash_attention_infer.ascend_package``: write the package's files and say how to build it."""

import argparse
import os

from flash_attention_infer.ascend_package.project import SOCS, write_package


def main(arguments=None):
    """Parse the command line and write the package."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_attention_infer.ascend_package",
        description="write the CANN custom-operator package of the attention kernels",
    )
    parser.add_argument("--out", required=True, help="folder to write to; must not exist or be empty")
    parser.add_argument("--soc", nargs="+", choices=sorted(SOCS), default=sorted(SOCS), help="default: both")
    options = parser.parse_args(arguments)
    if os.path.isdir(options.out) and os.listdir(options.out):
        parser.error("For '--out', the folder must be empty, but got '{}'.".format(options.out))
    files = write_package(options.out, options.soc)
    print("{} files in {}".format(len(files), options.out))
    for soc in options.soc:
        print("bash {} {}".format(os.path.join(options.out, "build.sh"), soc))


if __name__ == "__main__":
    main()
