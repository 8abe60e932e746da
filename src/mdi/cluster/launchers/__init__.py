"""Ways to bring nodes up: as local processes, or started manually on other machines."""
