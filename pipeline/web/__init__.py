"""The web: bodies and connections in, routes, their description, the dashboard's mount."""
