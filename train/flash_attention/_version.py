"""The package's version, kept here alone: setup.py reads this file as text, everything else imports it.

CalVer, YY.M.D of the release day: never to be mistaken for the unrelated project of the same name on PyPI (1.0.0).
"""

__version__ = "26.11.24"
