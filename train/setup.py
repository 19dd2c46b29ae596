"""Shim for the published instruction `cd train && python setup.py install`: runs the setup.py of the folder above."""

import os
import runpy

if __name__ == "__main__":
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runpy.run_path(os.path.join(root, "setup.py"), run_name="__main__")
