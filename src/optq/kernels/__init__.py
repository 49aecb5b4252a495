"""Products with packed weights. One kernel is one file and one row of :mod:`.table`."""
