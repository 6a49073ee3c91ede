"""`python -m llava_fn.plan`: print what an update will need."""

from llava_fn.launch import cli
from llava_fn.plan import plan

if __name__ == "__main__":
    cli.run(plan.main, cli.parse(plan.PRESETS, plan.__doc__ or ""))
