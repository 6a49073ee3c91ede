"""The one exception that a data policy may catch."""


class BadRecord(ValueError):
    """One record of a data set, or its image, cannot be used. The message says why and what to do.

    `on_bad_record="skip"` (llava_fn/data/records.py) catches this and nothing else, counts it and lists it.
    """
