"""One script a figure: it reads results and writes PDF and PNG."""
