"""The command line: one file per verb, in pipeline order."""
