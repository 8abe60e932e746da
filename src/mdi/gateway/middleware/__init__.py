"""Checks of every request before its route. One class a file."""
