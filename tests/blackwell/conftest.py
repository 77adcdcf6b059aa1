"""What stands in machine_code reads a wheel of 458 MB, which `make cubins` downloads."""

from __future__ import annotations

# Not part of any run that does not name the folder.
collect_ignore = ["machine_code"]
