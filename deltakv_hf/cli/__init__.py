"""The command line, `deltakv`; see `main.py`."""
