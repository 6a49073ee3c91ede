"""What a cell of the column answer accepts: one text, or a list of texts written as Python writes it."""

import ast
import re
import warnings

# A flat list of literals and nothing else: no call, no name, no nesting ever reaches the parser. The possessive
# quantifiers keep the time linear in the cell's length.
_ITEM = r"""(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[-+]?[0-9.][\w.+-]*+|True|False|None)"""
_LIST = re.compile(rf"\s*+\[\s*+{_ITEM}\s*+(?:,\s*+{_ITEM}\s*+)*+,?\s*+\]\s*+", re.DOTALL)


def golds(cell: str) -> list[str]:
    """The accepted answers: "[2011, 2015]" is two, "[Blue, Orange]" is one text, and so is everything that is no list.

    The cell is data: a flat list of literals is parsed by `ast.literal_eval`, and nothing is ever evaluated.
    Source: VLMEvalKit dataset/utils/vqa_eval.py, process_line, which evaluates the cell as code.
    """
    if not _LIST.fullmatch(cell):
        return [cell]
    try:
        with warnings.catch_warnings():  # about backslashes in somebody's answer
            warnings.simplefilter("ignore")
            return [str(item) for item in ast.literal_eval(cell.strip())]
    except (ValueError, SyntaxError):  # as in [007], which is no Python
        return [cell]
