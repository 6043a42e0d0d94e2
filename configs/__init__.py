"""Recipes: one file a system; each has `get_config(arg)` and opens with what it is, costs and reaches."""
