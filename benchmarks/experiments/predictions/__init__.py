"""What circuits predict about a model, and whether it holds."""
