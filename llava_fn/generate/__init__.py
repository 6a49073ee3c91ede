"""From a conversation to an answer."""
