"""`python -m llava_fn.plan`: print the memory, traffic and time of an update."""

from llava_fn.launch import cli
from llava_fn.plan.options import DESCRIPTION, PRESETS, PlanOptions


def main(c: PlanOptions) -> None:
    """Plan, and print the report."""
    from llava_fn.plan import plan  # imports torch, which --help does not need

    plan.main(c)


if __name__ == "__main__":
    cli.run(main, cli.parse(PRESETS, DESCRIPTION))
