"""What of a file lies in the memory of this process."""

import re
from pathlib import Path


def resident(path: Path) -> int:
    """Bytes of a file that this process holds in memory."""
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    mine = [block for block in blocks if block.partition("\n")[0].endswith(str(path))]
    assert mine, "the file is not mapped"
    return sum(1024 * int(re.search(r"Rss:\s+(\d+)", block)[1]) for block in mine)
