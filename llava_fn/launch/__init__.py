"""The machine: environment, device, processes, command line."""
