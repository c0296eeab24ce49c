"""`python -m tilewright_train`, which torchrun can start, is `train-pretrain`."""

from tilewright_train.cli import pretrain

if __name__ == "__main__":
    pretrain()
