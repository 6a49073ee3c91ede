"""The cost of an update on a mesh, found without devices."""
