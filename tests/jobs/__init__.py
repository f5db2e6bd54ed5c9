# Here, so that workers that import a test's functions need not import what its fixtures do.
NUM_CPUS = 2
"""Of the Ray cluster that tests share."""
