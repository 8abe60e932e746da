"""Checks of every request before its route: the API key, then the size of the body. One class a file."""
