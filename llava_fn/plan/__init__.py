"""What an update will need on a mesh, found without devices."""
