"""Train a recipe; the same run as `entrecipes run`.

accelerate launch scripts/train.py RECIPE [key=value ...]
accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/train.py digits/demo training.images=20k
"""

import sys

from entrecipes.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
