"""The process of one node: its server, its life, its compute thread, its weights. The starter is not known here."""
