"""One script for each figure: it reads results and writes PDF and PNG."""
