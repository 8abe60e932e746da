"""How model families write calls of tools: how each is found, its grammars and its parsers."""
