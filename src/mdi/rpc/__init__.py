"""Messages, service, callers, encrypted channels and certificates: what the starter and the nodes share."""
