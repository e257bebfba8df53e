"""Everything that knows about the command line, the environment and the processes of a run."""
