"""The commands of `rbe`, a module each: `run` takes the parsed options, prints a table or JSON on stdout and progress on stderr, and raises on failure."""
