"""The command line and what it runs: benchmark, self-test, evaluation."""
