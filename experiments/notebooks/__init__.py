"""Notebooks: scripts in jupytext's percent format, each beside the notebook that it was executed as."""
