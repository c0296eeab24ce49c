"""`python -m tilewright_train`, which torchrun can start: `train-pretrain`.

With `--objective sft` it is `train-sft`, with `--objective dpo` `train-dpo`.
"""

from tilewright_train.cli import pretrain

if __name__ == "__main__":
    pretrain()
