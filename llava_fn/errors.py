"""Errors that callers tell apart from others."""


class BadRecord(ValueError):
    """One record of a data set, or its image, cannot be used. The message says why and what to do.

    `on_bad_record="skip"` (llava_fn/data/records.py) catches this and nothing else, counts it and lists it.
    """


class TooLong(BadRecord):
    """One record has more tokens than a sample may have."""


class NonFinite(ArithmeticError):
    """The loss or a gradient is NaN or infinite. The message names the step, the records and the first such leaf."""
