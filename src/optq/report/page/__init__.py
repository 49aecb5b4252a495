"""The report: what is on disk of a quantized checkpoint, as one HTML page that needs no network."""
