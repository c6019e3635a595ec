"""`python -m deploy export`: from a model of transformers to a verified bundle."""
