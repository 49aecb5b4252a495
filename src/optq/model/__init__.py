"""What a language model looks like to a solver: blocks, sites, layers, and their inputs."""
