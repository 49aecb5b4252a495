"""``python -m optq``."""

from optq.cli import main

main()
