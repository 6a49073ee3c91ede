"""What surrounds a program: environment variables, device, processes, command line."""
