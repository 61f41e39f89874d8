"""The checks, one file a category. Each is a function `test_...`; `trained` is what there is to check."""
