"""Linear maps between the residual streams of a dense and a sparse model, and edits across them."""
