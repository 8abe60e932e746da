"""What travels between nodes: messages, service, encrypted channels, certificates. Knows no node and no starter."""
