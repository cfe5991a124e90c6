"""The faces of the programs: options, and what goes wrong with them."""
