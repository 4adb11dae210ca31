"""Commands of `neucore`, one a module: HELP, add_arguments(parser), run(arguments). Light until they run."""
