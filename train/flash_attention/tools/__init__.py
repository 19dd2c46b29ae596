"""The command line, on top of everything else: nothing in the package imports it."""
