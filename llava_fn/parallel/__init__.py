"""Mesh axes and the collectives on them. On an axis of size 1 every collective is the identity."""
