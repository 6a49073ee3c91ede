"""The first hour on a card: what may fail there, in order of risk, each part in a process of its own."""
