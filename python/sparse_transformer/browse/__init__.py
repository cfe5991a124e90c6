"""A whole model as one page to look around in: `python -m sparse_transformer.browse`."""
